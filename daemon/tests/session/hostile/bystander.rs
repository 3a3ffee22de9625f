//! Another guest of the daemon, that works all the while: one job after the other that faults on a page which it supplies.

use crate::vmm::Vmm;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::*;
use zerocopy::{FromBytes, IntoBytes};

const A: u64 = 0x7f00_0000_0000;
const C: u64 = 0x4_0000_0000;
const PAGE: u64 = 4096;
/// Guest-physical page that everything is supplied with.
const SUPPLIED: u64 = 0x18_0000;
const BUFFER: u64 = 0x30_0000;
const EVENTQ: usize = 2;

/// The guest, on a thread of its own.
pub struct Bystander {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Bystander {
    pub fn start(socket: &Path) -> Self {
        let (rounds, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let mut work = Work { vmm: Vmm::start(socket), seq: 0 };
        work.set_up();
        let thread = std::thread::spawn({
            let (rounds, stop) = (Arc::clone(&rounds), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    work.round(rounds.load(Ordering::Relaxed) % 64);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { rounds, stop, thread }
    }

    /// Waits for a round that began and ended after this was called.
    pub fn wait_for_a_round(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        super::until("work of the other guest", || {
            assert!(!self.thread.is_finished(), "the other guest was disturbed");
            (self.rounds.load(Ordering::Relaxed) >= before + 2).then_some(())
        });
    }

    /// Rounds that it has done in all.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.rounds.load(Ordering::Relaxed)
    }
}

struct Work {
    vmm: Vmm,
    /// Of the last invalidation.
    seq: u64,
}

impl Work {
    fn set_up(&mut self) {
        self.done(super::hello(1).as_bytes());
        self.done(super::create_context(1).as_bytes());
        let create = request(SVM_REQ_VM_CREATE, VmCreate::default().as_bytes());
        self.submit(&create);
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: (64 * PAGE).into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        let bind = VmBind { vm_id: 1.into(), num_binds: 1.into(), ..VmBind::default() };
        self.submit(&request(SVM_REQ_VM_BIND, &[bind.as_bytes(), op.as_bytes()].concat()));
    }

    /// A job that writes to a page, its fault, the answer, the end, the word, and the page's withdrawal.
    fn round(&mut self, page: u64) {
        self.vmm.write(SUPPLIED, &[0; 8]);
        let at = page * PAGE;
        let fill = Packet {
            opcode: OP_FILL.into(),
            dst: (C + at).into(),
            len: 8.into(),
            value: (page + 1).into(),
            ..Packet::default()
        };
        let exec = Exec { vm_id: 1.into(), num_packets: 1.into(), user_data: at.into(), ..Exec::default() };
        self.submit(&request(SVM_REQ_EXEC, &[exec.as_bytes(), fill.as_bytes()].concat()));
        let fault = FaultRecord::read_from_bytes(&self.record()).unwrap();
        assert_eq!((fault.kind.get(), fault.cpu_addr.get()), (EVENT_FAULT, A + at), "{fault:?}");
        let answer = PageResponse {
            hdr: super::hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, 1),
            cookie: fault.cookie,
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 1.into(),
            flags: 0.into(),
        };
        let run = PageRun {
            va: (A + at).into(),
            gpa: SUPPLIED.into(),
            pages: 1.into(),
            as_of: self.seq.into(),
            ..PageRun::default()
        };
        self.done(&[answer.as_bytes(), run.as_bytes()].concat());
        let job = JobRecord::read_from_bytes(&self.record()).unwrap();
        assert_eq!(
            (job.kind.get(), job.status.get(), job.user_data.get()),
            (EVENT_JOB_DONE, 0, at),
            "{job:?}"
        );
        assert_eq!(self.vmm.read(SUPPLIED, 8), (page + 1).to_le_bytes());
        let hdr = super::hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, 1);
        let invalidate =
            Invalidate { hdr, start: (A + at).into(), length: PAGE.into(), ..Invalidate::default() };
        let answer = InvalidateResp::read_from_bytes(&self.done(invalidate.as_bytes())).unwrap();
        self.seq = answer.seq.get();
    }

    fn done(&mut self, command: &[u8]) -> Vec<u8> {
        let answer = self.vmm.command(command);
        let (head, _) = SvmResp::read_from_prefix(&answer).unwrap();
        assert_eq!((head.hdr.kind.get(), head.status.get()), (VIRTIO_GPU_RESP_OK_NODATA, 0));
        answer
    }

    fn submit(&mut self, request: &[u8]) {
        let size = (request.len() as u32).into();
        let head = CmdSubmit { hdr: super::hdr(VIRTIO_GPU_CMD_SUBMIT_3D, 1), size, ..CmdSubmit::default() };
        self.done(&[head.as_bytes(), request].concat());
    }

    /// The next record but those of invalidations that are done.
    fn record(&mut self) -> [u8; EVENT_RECORD_BYTES] {
        loop {
            self.vmm.descriptor(EVENTQ, 0, BUFFER, (size_of::<EventHdr>() + EVENT_RECORD_BYTES) as u32, 2, 0);
            self.vmm.offer(EVENTQ, 0, true);
            let (_, length) = self.vmm.wait_used(EVENTQ);
            let bytes = self.vmm.read(BUFFER, length as usize);
            let record: [u8; EVENT_RECORD_BYTES] = bytes[size_of::<EventHdr>()..].try_into().unwrap();
            if record[..4] != EVENT_INVAL_DONE.to_le_bytes() {
                return record;
            }
        }
    }
}

/// A request from a struct that begins with an empty header.
fn request(cmd: u32, bytes: &[u8]) -> Vec<u8> {
    let hdr = ReqHdr { cmd: cmd.into(), len: (bytes.len() as u32).into(), ..ReqHdr::default() };
    [hdr.as_bytes(), &bytes[size_of::<ReqHdr>()..]].concat()
}
