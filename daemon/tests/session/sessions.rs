//! Connections: handshake, config space, one after the other, side by side, and what they leave behind.

use crate::vmm::{PATIENCE, Vmm, connect, negotiate};
use crate::{Daemon, spec};
use daemon::limits::Overrides;
use daemon::registry::{Endpoint, GuestSpec, RegistryEvent};
use daemon::relay::Relay;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_gpu_svm::protocol::{CONFIG_SIZE, NUM_QUEUES, SVM_CONFIG_OFFSET, SVM_MAGIC};

#[test]
fn handshake_offers_what_is_served() {
    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    let mut frontend = Frontend::connect(&socket, 3).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    // VIRGL, RESOURCE_BLOB, CONTEXT_INIT; INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES; VERSION_1, IN_ORDER.
    let expected = [0, 3, 4, 28, 29, 30, 32, 35].map(|bit| 1u64 << bit).iter().sum::<u64>();
    assert_eq!(features, expected);
    let protocol = frontend.get_protocol_features().unwrap();
    for never in [
        VhostUserProtocolFeatures::STATUS,
        VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        VhostUserProtocolFeatures::LOG_SHMFD,
    ] {
        assert!(!protocol.contains(never), "{never:?}");
    }
    frontend.set_protocol_features(protocol).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), NUM_QUEUES as u64);
}

#[test]
fn config_space_answers_any_size_and_offset() {
    let daemon = Daemon::start();
    let mut frontend = connect(&daemon.add("vm0"));
    let mut whole = vec![0; 0x1000];
    for (offset, size) in
        [(0, 1), (0, 4), (3, 2), (0, 128), (0, 0xff4), (127, 2), (128, 4), (0xfff, 1), (64, 64)]
    {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = frontend.get_config(offset, size, flags, &vec![0xff; size as usize]).unwrap();
        assert_eq!(bytes.len(), size as usize);
        let at = offset as usize;
        whole[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    assert_eq!(whole[SVM_CONFIG_OFFSET..SVM_CONFIG_OFFSET + 4], SVM_MAGIC.to_le_bytes());
    assert!(whole[CONFIG_SIZE..].iter().all(|byte| *byte == 0));
}

#[test]
fn config_writes_are_taken_and_have_no_effect() {
    let daemon = Daemon::start();
    let mut frontend = connect(&daemon.add("vm0"));
    let read = |frontend: &mut Frontend| {
        frontend.get_config(0, 128, VhostUserConfigFlags::empty(), &[0; 128]).unwrap().1
    };
    let before = read(&mut frontend);
    for offset in [0, 4, 64, 126, 0xff0] {
        frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, &[0xff; 4]).unwrap();
    }
    assert_eq!(read(&mut frontend), before);
}

#[test]
fn vmm_that_comes_too_often_waits_and_nobody_else_does() {
    let daemon = Daemon::start();
    let (often, other) = (daemon.path("often.sock"), daemon.add("other"));
    // The next one waits for a minute, longer than anybody here.
    let limits = Overrides::new([("sessions".to_owned(), 1)]).unwrap();
    assert!(daemon.registry.add(GuestSpec { limits, ..spec("often", &often) }).unwrap());
    drop(Vmm::start(&often));
    daemon.wait_disconnected();
    let waiting = UnixStream::connect(&often).unwrap();
    let (registry, (tell, told)) = (Arc::clone(&daemon.registry), channel());
    std::thread::spawn(move || {
        let mut entries = std::iter::repeat_with(|| registry.get("often").unwrap());
        tell.send(entries.find(|entry| entry.session_rate.refused > 0).unwrap()).unwrap();
    });
    let entry = told.recv_timeout(PATIENCE).expect("the VMM does not wait, or who asks after it does");
    assert_eq!((entry.session_rate.used, entry.session_rate.limit, entry.sessions), (1, 1, 1));
    assert!(!Vmm::start(&other).command(&[0; 24]).is_empty());
    // Its wait holds up nobody who takes the guest away.
    assert!(daemon.registry.remove("often"));
    drop(waiting);
}

#[test]
fn guest_relistens_after_its_vmm_left() {
    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    for sessions in 1..=3 {
        let vmm = Vmm::start(&socket);
        daemon.guest("vm0");
        let entry = daemon.registry.get("vm0").unwrap();
        assert!(entry.connected && entry.status.is_some());
        assert_eq!(entry.sessions, sessions);
        drop(vmm);
        assert_eq!(daemon.wait_disconnected(), "the VMM left");
        let entry = daemon.registry.get("vm0").unwrap();
        assert!(!entry.connected && entry.status.is_none() && entry.last_error.is_none());
        assert!(daemon.registry.guest("vm0").is_none() && daemon.registry.host().guests().is_empty());
    }
}

#[test]
fn second_connection_waits_for_the_first_to_leave() {
    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    let mut first = Vmm::start(&socket);
    // It is connected but not spoken to; its request is answered when its turn comes.
    let second = std::thread::spawn({
        let socket = socket.clone();
        move || drop(Vmm::start(&socket))
    });
    assert!(!first.command(&[0; 24]).is_empty());
    daemon.guest("vm0");
    assert_eq!(daemon.registry.get("vm0").unwrap().sessions, 1);
    drop(first);
    second.join().unwrap();
    for _ in 0..2 {
        assert_eq!(daemon.wait_disconnected(), "the VMM left");
    }
    assert_eq!(daemon.registry.get("vm0").unwrap().sessions, 2);
}

#[test]
fn garbage_ends_the_session_and_the_next_is_served() {
    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    let garbage = [
        vec![0xff; 64],
        header(1, 1, u32::MAX),
        header(0xffff, 1, 0),
        header(1, 2, 0),
        header(1, 1 | 4, 0),
        header(5, 1, 8),
        vec![1],
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // It may have hung up before all of it was written.
        stream.write_all(&bytes).ok();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        daemon.wait_disconnected();
    }
    assert!(!Vmm::start(&socket).command(&[0; 24]).is_empty());
}

#[test]
fn guests_do_not_disturb_each_other() {
    let daemon = Daemon::start();
    let sockets: Vec<_> = (0..4).map(|n| daemon.add(&format!("vm{n}"))).collect();
    let mut vmms: Vec<_> = sockets.iter().map(|socket| Vmm::start(socket)).collect();
    vmms[0].corrupt_avail(0, 999);
    drop(vmms.remove(1));
    daemon.wait_disconnected();
    assert!(daemon.registry.remove("vm2"));
    let mut last = vmms.pop().unwrap();
    assert!(!last.command(&[0; 24]).is_empty());
}

#[test]
fn removal_ends_a_live_session() {
    let daemon = Daemon::start();
    let socket = daemon.add("vm0");
    let vmm = Vmm::start(&socket);
    assert!(daemon.registry.remove("vm0"));
    assert!(!socket.exists());
    assert!(vmm.frontend.get_features().is_err());
    assert_eq!(daemon.wait_disconnected(), "removed");
    assert_eq!(daemon.event(), RegistryEvent::GuestRemoved { name: "vm0".into() });
}

#[test]
fn inherited_connection_is_served_once() {
    let daemon = Daemon::start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let socket = Endpoint::Connected(Relay::new(OwnedFd::from(theirs)).unwrap());
    let spec = GuestSpec { name: "vm0".into(), socket, devices: None, limits: Overrides::default() };
    assert!(daemon.registry.add(spec).unwrap());
    let mut vmm = Vmm::start_on(negotiate(Frontend::from_stream(ours, 3)));
    assert!(!vmm.command(&[0; 24]).is_empty());
    drop(vmm);
    assert_eq!(daemon.wait_disconnected(), "the VMM left");
    assert!(daemon.registry.remove("vm0"));
}

#[test]
fn inherited_connection_ends_with_its_guest() {
    let daemon = Daemon::start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let socket = Endpoint::Connected(Relay::new(OwnedFd::from(theirs)).unwrap());
    assert!(
        daemon
            .registry
            .add(GuestSpec { name: "vm0".into(), socket, devices: None, limits: Overrides::default() })
            .unwrap()
    );
    let vmm = Vmm::start_on(negotiate(Frontend::from_stream(ours, 3)));
    assert!(daemon.registry.remove("vm0"));
    assert!(vmm.frontend.get_features().is_err());
}

#[test]
fn inherited_listener_is_served_and_left_alone() {
    let daemon = Daemon::start();
    let path = daemon.path("inherited.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = Endpoint::Listener(OwnedFd::from(listener));
    assert!(
        daemon
            .registry
            .add(GuestSpec { name: "vm0".into(), socket, devices: None, limits: Overrides::default() })
            .unwrap()
    );
    for _ in 0..2 {
        drop(Vmm::start(&path));
        assert_eq!(daemon.wait_disconnected(), "the VMM left");
    }
    assert!(daemon.registry.remove("vm0"));
    assert!(path.exists(), "an inherited socket is not ours to remove");
}

#[test]
fn shutdown_ends_everything() {
    let daemon = Daemon::start();
    let sockets = [daemon.add("vm0"), daemon.add("vm1")];
    let vmm = Vmm::start(&sockets[0]);
    daemon.registry.shutdown();
    assert!(vmm.frontend.get_features().is_err());
    assert!(sockets.iter().all(|socket| !socket.exists()));
    assert!(daemon.registry.list().is_empty());
    assert!(daemon.registry.add(spec("vm2", &daemon.path("vm2.sock"))).is_err());
}
