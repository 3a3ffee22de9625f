//! Rings as a guest's driver uses and abuses them, and what happens when a VMM stops them.

use crate::Daemon;
use crate::vmm::{PATIENCE, Vmm};
use std::time::Instant;
use virtio_gpu_svm::protocol::VERSION_MAJOR;
use virtio_gpu_svm::protocol::control::{Hello, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO};
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY, VIRTIO_GPU_CMD_UPDATE_CURSOR,
    VIRTIO_GPU_RESP_OK_NODATA,
};
use virtio_gpu_svm::protocol::{CAPSET_SVM, MAX_COMMAND_BYTES};
use zerocopy::{FromBytes, IntoBytes};

const CONTROLQ: usize = 0;
const EVENTQ: usize = 2;

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

fn hello(incarnation: u64) -> Hello {
    let version = u32::from(VERSION_MAJOR) << 16;
    let (hdr, incarnation) = (hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0), incarnation.into());
    Hello { hdr, incarnation, version: version.into(), ..Hello::default() }
}

fn create_context(ctx_id: u32) -> CtxCreate {
    CtxCreate {
        hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id),
        nlen: 4.into(),
        context_init: CAPSET_SVM.into(),
        debug_name: std::array::from_fn(|i| *b"test".get(i).unwrap_or(&0)),
    }
}

fn kind(answer: &[u8]) -> u32 {
    CtrlHdr::read_from_prefix(answer).unwrap().0.kind.get()
}

/// A guest whose driver has said HELLO and has one context, number 7.
fn with_context(daemon: &Daemon) -> Vmm {
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    assert_eq!(kind(&vmm.command(hello(1).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(kind(&vmm.command(create_context(7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(contexts(daemon), 1);
    vmm
}

fn contexts(daemon: &Daemon) -> usize {
    daemon.guest("vm0").status().contexts
}

fn frozen(daemon: &Daemon) -> bool {
    daemon.guest("vm0").status().frozen
}

/// The flag of the files is the VMM's as much as ours.
#[test]
fn vmm_that_jams_its_event_files_holds_up_nobody() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    let mut other = Vmm::start(&daemon.add("other"));
    vmm.jam();
    // Each answer is followed by an interrupt for which there is no room.
    for ctx_id in 8..12 {
        vmm.send_on(CONTROLQ, create_context(ctx_id).as_bytes());
        let deadline = Instant::now() + PATIENCE;
        while vmm.take_used(CONTROLQ).is_none() {
            assert!(Instant::now() < deadline, "no answer to command {ctx_id}");
            std::thread::yield_now();
        }
    }
    assert_eq!(contexts(&daemon), 5);
    assert!(!other.command(&[0; 24]).is_empty());
    assert!(daemon.registry.remove("vm0"));
}

#[test]
fn commands_are_answered_in_order() {
    let daemon = Daemon::start();
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    // Eight chains made available at once, one kick.
    for i in 0..8u16 {
        let (request, answer) = (0x10_0000 + 0x1000 * u64::from(i), 0x20_0000 + 0x1000 * u64::from(i));
        vmm.write(request, create_context(u32::from(i) + 1).as_bytes());
        vmm.descriptor(CONTROLQ, 2 * i, request, size_of::<CtxCreate>() as u32, 1, 2 * i + 1);
        vmm.descriptor(CONTROLQ, 2 * i + 1, answer, 4096, 2, 0);
        vmm.offer(CONTROLQ, 2 * i, i == 7);
    }
    for i in 0..8u32 {
        let (id, len) = vmm.wait_used(CONTROLQ);
        assert_eq!((id, len as usize), (2 * i, size_of::<SvmResp>()));
        let answer = vmm.read(0x20_0000 + 0x1000 * u64::from(i), len as usize);
        assert_eq!(kind(&answer), VIRTIO_GPU_RESP_OK_NODATA);
    }
    assert_eq!(contexts(&daemon), 8);
}

#[test]
fn cursor_commands_are_answered() {
    let daemon = Daemon::start();
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    let answer = vmm.command_on(1, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes());
    assert!(answer.len() >= size_of::<CtrlHdr>());
}

#[test]
fn command_longer_than_allowed_is_refused_with_an_answer() {
    let daemon = Daemon::start();
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    vmm.write(0x10_0000, create_context(1).as_bytes());
    vmm.descriptor(CONTROLQ, 0, 0x10_0000, MAX_COMMAND_BYTES as u32, 1, 1);
    vmm.descriptor(CONTROLQ, 1, 0x10_0000, 64, 1, 2);
    vmm.descriptor(CONTROLQ, 2, 0x30_0000, 256, 2, 0);
    vmm.offer(CONTROLQ, 0, true);
    let (_, len) = vmm.wait_used(CONTROLQ);
    let answer = vmm.read(0x30_0000, len as usize);
    assert_ne!(kind(&answer), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(contexts(&daemon), 0);
}

#[test]
fn event_buffers_are_kept_until_there_is_a_record() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    for i in 0..4 {
        vmm.descriptor(EVENTQ, i, 0x30_0000 + 0x1000 * u64::from(i), 4096, 2, 0);
        vmm.offer(EVENTQ, i, true);
    }
    // A round trip on the same thread: the kicks above have been handled when it is answered.
    assert_eq!(kind(&vmm.command(create_context(8).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(vmm.take_used(EVENTQ), None);
    assert_eq!(kind(&vmm.command(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    // The record that the context has retired.
    let (id, len) = vmm.wait_used(EVENTQ);
    assert_eq!((id, len), (0, 24 + 96));
    assert_eq!(vmm.take_used(EVENTQ), None);
}

#[test]
fn records_wait_for_buffers_and_small_buffers_return_empty() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    assert_eq!(kind(&vmm.command(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    vmm.descriptor(EVENTQ, 0, 0x30_0000, 24, 2, 0);
    vmm.descriptor(EVENTQ, 1, 0x30_1000, 4096, 2, 0);
    vmm.offer(EVENTQ, 0, false);
    vmm.offer(EVENTQ, 1, true);
    assert_eq!(vmm.wait_used(EVENTQ), (0, 0));
    assert_eq!(vmm.wait_used(EVENTQ), (1, 24 + 96));
}

#[test]
fn broken_ring_rests_until_it_is_stopped() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    vmm.corrupt_avail(CONTROLQ, 1000);
    // Another ring goes on.
    assert!(!vmm.command_on(1, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes()).is_empty());
    assert_eq!(vmm.take_used(CONTROLQ), None);
    vmm.stop_rings();
    vmm.start_rings(true);
    assert_eq!(kind(&vmm.command(hello(2).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
}

#[test]
fn stopped_rings_freeze_and_a_driver_that_goes_on_thaws() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    assert_eq!(vmm.stop_rings(), [2, 0, 0]);
    assert!(frozen(&daemon));
    vmm.start_rings(false);
    // Noticed without a command. The framework shows rings that were started together in any order.
    let deadline = Instant::now() + PATIENCE;
    while frozen(&daemon) {
        assert!(Instant::now() < deadline, "nobody thaws it");
        std::thread::yield_now();
    }
    assert_eq!(contexts(&daemon), 1);
    let again = vmm.command(create_context(7).as_bytes());
    assert_ne!(kind(&again), VIRTIO_GPU_RESP_OK_NODATA, "context 7 is still there");
}

#[test]
fn driver_that_begins_anew_without_hello_finds_nothing() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    vmm.stop_rings();
    vmm.start_rings(true);
    vmm.command_on(1, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes());
    assert!(frozen(&daemon), "nothing says yet who is there");
    assert_eq!(kind(&vmm.command(create_context(7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert!(!frozen(&daemon));
    assert_eq!(contexts(&daemon), 1);
}

#[test]
fn hello_with_the_same_incarnation_keeps_contexts_and_a_new_one_drops_them() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    for (incarnation, left) in [(1, 1), (2, 0)] {
        vmm.stop_rings();
        vmm.start_rings(true);
        assert_eq!(kind(&vmm.command(hello(incarnation).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
        assert!(!frozen(&daemon));
        assert_eq!(contexts(&daemon), left);
    }
}

#[test]
fn refused_hello_neither_thaws_nor_drops() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    vmm.stop_rings();
    vmm.start_rings(true);
    for _ in 0..2 {
        assert_ne!(kind(&vmm.command(hello(0).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
        assert!(frozen(&daemon), "nothing says yet who is there");
        assert_eq!(contexts(&daemon), 1);
    }
    assert_eq!(kind(&vmm.command(hello(1).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert!(!frozen(&daemon));
    assert_eq!(contexts(&daemon), 1);
}

#[test]
fn records_of_a_driver_that_is_gone_are_not_delivered_to_the_next() {
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    assert_eq!(kind(&vmm.command(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    vmm.stop_rings();
    vmm.start_rings(true);
    vmm.descriptor(EVENTQ, 0, 0x30_0000, 4096, 2, 0);
    vmm.offer(EVENTQ, 0, true);
    vmm.command_on(1, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes());
    assert_eq!(vmm.take_used(EVENTQ), None);
}

#[test]
fn device_reset_is_a_new_driver() {
    use vhost::vhost_user::VhostUserFrontend;
    let daemon = Daemon::start();
    let mut vmm = with_context(&daemon);
    vmm.frontend.reset_device().unwrap();
    assert!(frozen(&daemon));
    vmm.stop_rings();
    vmm.restore_features();
    vmm.start_rings(true);
    assert_eq!(kind(&vmm.command(create_context(7).as_bytes())), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(contexts(&daemon), 1);
}

/// A kick file that cannot be read ends the framework's queue thread, which tells nobody: the session must end too.
#[test]
fn queue_thread_that_ends_takes_its_session_along() {
    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vhost::vhost_user::{Frontend, VhostUserFrontend};

    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    let stream = UnixStream::connect(&socket).unwrap();
    let mut frontend = crate::vmm::negotiate(Frontend::from_stream(stream.try_clone().unwrap(), 3));
    // Nameless, readable, and not to be read.
    let kick = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let ready = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    epoll::add(&kick, &ready, epoll::EventData::new_u64(0), epoll::EventFlags::OUT).unwrap();
    // SET_VRING_KICK of ring 0, version 1, eight bytes.
    let mut message = [12u32, 1, 8].map(u32::to_le_bytes).concat();
    message.extend(0u64.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [kick.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).unwrap();
    // The session may end before this is answered.
    frontend.set_vring_enable(0, true).ok();
    let reason = daemon.wait_disconnected();
    assert!(reason.contains("queue thread"), "{reason}");
    drop(frontend);
    assert!(!Vmm::start(&socket).command(&[0; 24]).is_empty());
}
