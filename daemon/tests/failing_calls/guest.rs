//! One guest's life: connect, a context with a GPU VM on each device, a job on each that faults, and the end. Whatever
//! goes wrong is an error with a text, and so is a connection that the daemon closes; only silence is a panic.

#![expect(unsafe_code, reason = "the frontend's socket is known by its number only")]

use super::vmm::{PATIENCE, Vmm};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::control::{
    Hello, PAGE_RESP_SUCCESS, PageResponse, PageRun, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO,
    VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
};
use virtio_gpu_svm::protocol::event::{
    EVENT_FAULT, EVENT_JOB_DONE, EVENT_RECORD_BYTES, EventHdr, FaultRecord, JobRecord,
};
use virtio_gpu_svm::protocol::gpu::{
    CmdSubmit, CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY,
    VIRTIO_GPU_CMD_SUBMIT_3D,
};
use virtio_gpu_svm::protocol::job::{OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::{
    BIND_OP_MAP_USERPTR, BindOp, Exec, ReqHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, VmBind,
    VmCreate, VmCreateRsp,
};
use virtio_gpu_svm::protocol::{CAPSET_SVM, EVENTQ, PAGE_SIZE, VERSION_MAJOR, VERSION_MINOR};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const CTX: u32 = 1;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;
const EVENTS: u64 = 0x30_0000;
const EVENT_BUFFERS: u16 = 4;
/// Where in guest memory the process' page is, one for each device.
const PAGE: u64 = 0x38_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

pub type Outcome<T> = Result<T, String>;

/// Silence: neither an answer nor the end of the connection.
pub const SILENCE: &str = "silence";

struct Guest {
    vmm: Vmm,
    records: Vec<Vec<u8>>,
}

/// One whole life on a daemon with `devices` devices. Its results are its own: `value` tells lives apart.
pub fn live(socket: &Path, devices: u32, value: u64) -> Outcome<()> {
    // The frontend's own steps panic when the connection breaks.
    let told = catch_unwind(AssertUnwindSafe(|| {
        let mut guest = Guest { vmm: Vmm::start(socket), records: Vec::new() };
        guest.run(devices, value)
    }));
    told.unwrap_or_else(|panic| Err(format!("connecting: {:?}", panic.downcast_ref::<String>())))
}

impl Guest {
    fn run(&mut self, devices: u32, value: u64) -> Outcome<()> {
        for index in 0..EVENT_BUFFERS {
            self.post(index);
        }
        let version = u32::from(VERSION_MAJOR) << 16 | u32::from(VERSION_MINOR);
        let hdr = header(VIRTIO_GPU_CMD_SVM_HELLO, 0);
        let hello =
            Hello { hdr, incarnation: (value | 1).into(), version: version.into(), reserved: 0.into() };
        self.send(hello.as_bytes())?;
        let hdr = header(VIRTIO_GPU_CMD_CTX_CREATE, CTX);
        let create = CtxCreate { hdr, context_init: CAPSET_SVM.into(), ..CtxCreate::default() };
        self.send(create.as_bytes())?;
        for device in 0..devices {
            self.job(device, value.wrapping_add(device.into()))?;
        }
        self.send(header(VIRTIO_GPU_CMD_CTX_DESTROY, CTX).as_bytes()).map(drop)
    }

    /// A job whose only access faults.
    fn job(&mut self, dev_id: u32, value: u64) -> Outcome<()> {
        let page = PAGE + u64::from(dev_id) * PAGE_SIZE;
        let cpu = A + u64::from(dev_id) * PAGE_SIZE;
        self.vmm.write(page, &[0; 16]);
        let create = VmCreate {
            hdr: request::<VmCreate>(SVM_REQ_VM_CREATE, 0),
            dev_id: dev_id.into(),
            ..VmCreate::default()
        };
        let reply: VmCreateRsp = self.submit(create.as_bytes())?;
        let vm_id = reply.vm_id;
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: PAGE_SIZE.into(),
            obj_offset: cpu.into(),
            ..BindOp::default()
        };
        let hdr = request::<VmBind>(SVM_REQ_VM_BIND, size_of::<BindOp>());
        let bind = VmBind { hdr, vm_id, num_binds: 1.into(), ..VmBind::default() };
        self.submit::<ReqHdr>(&[bind.as_bytes(), op.as_bytes()].concat())?;
        let packet = Packet {
            opcode: OP_FILL.into(),
            dst: C.into(),
            len: 8.into(),
            value: value.into(),
            ..Packet::default()
        };
        let hdr = request::<Exec>(SVM_REQ_EXEC, size_of::<Packet>());
        let exec = Exec { hdr, vm_id, num_packets: 1.into(), user_data: value.into(), ..Exec::default() };
        self.submit::<ReqHdr>(&[exec.as_bytes(), packet.as_bytes()].concat())?;
        let job = self.serve(cpu, page)?;
        if job.status.get() != 0 {
            return Err(format!("the job on device {dev_id} ended with {}", job.status.get()));
        }
        assert_eq!(job.user_data.get(), value, "another job's end");
        assert_eq!(self.vmm.read(page, 8), value.to_le_bytes(), "a job's result is not its own");
        Ok(())
    }

    /// Answers faults until a job ends.
    fn serve(&mut self, cpu: u64, page: u64) -> Outcome<JobRecord> {
        loop {
            let record = self.record()?;
            let kind = u32::from_le_bytes(*record.first_chunk().unwrap());
            if kind == EVENT_JOB_DONE {
                return Ok(JobRecord::read_from_bytes(&record).unwrap());
            }
            if kind == EVENT_FAULT {
                let fault = FaultRecord::read_from_bytes(&record).unwrap();
                assert_eq!(fault.cpu_addr.get(), cpu, "another page's fault");
                let hdr = header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, CTX);
                let (code, num_runs) = (PAGE_RESP_SUCCESS.into(), 1.into());
                let head = PageResponse { hdr, cookie: fault.cookie, code, num_runs, flags: 0.into() };
                let run = PageRun { va: cpu.into(), gpa: page.into(), pages: 1.into(), ..PageRun::default() };
                self.send(&[head.as_bytes(), run.as_bytes()].concat())?;
            }
        }
    }

    fn post(&mut self, index: u16) {
        let at = EVENTS + u64::from(index) * 0x1000;
        self.vmm.descriptor(EVENTQ.into(), index, at, 0x1000, WRITE, 0);
        self.vmm.offer(EVENTQ.into(), index, true);
    }

    fn record(&mut self) -> Outcome<Vec<u8>> {
        while self.records.is_empty() {
            let (id, len) = self.used(EVENTQ.into())?;
            let bytes = self.vmm.read(EVENTS + u64::from(id) * 0x1000, len as usize);
            let (head, records) = EventHdr::read_from_prefix(&bytes).unwrap();
            let records = records.chunks(EVENT_RECORD_BYTES).take(head.num_records.get() as usize);
            self.records = records.map(<[u8]>::to_vec).collect();
            self.post(id as u16);
        }
        Ok(self.records.remove(0))
    }

    /// The next used entry of a queue.
    fn used(&mut self, queue: usize) -> Outcome<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.vmm.take_used(queue) {
                return Ok(used);
            }
            if hung_up(&self.vmm.frontend) {
                return Err(format!("the daemon has closed the connection, queue {queue}"));
            }
            if Instant::now() > deadline {
                return Err(format!("{SILENCE} on queue {queue}"));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// One command; what stands behind its head.
    fn send(&mut self, command: &[u8]) -> Outcome<Vec<u8>> {
        self.vmm.write(REQUEST, command);
        self.vmm.descriptor(0, 0, REQUEST, command.len() as u32, NEXT, 1);
        self.vmm.descriptor(0, 1, ANSWER, 4096, WRITE, 0);
        self.vmm.offer(0, 0, true);
        let (_, len) = self.used(0)?;
        let answer = self.vmm.read(ANSWER, len as usize);
        let (head, rest) =
            SvmResp::read_from_prefix(&answer).map_err(|_| format!("an answer of {len} bytes"))?;
        if head.status.get() != 0 {
            return Err(format!("refused with {}: {head:?}", head.status.get()));
        }
        Ok(rest.to_vec())
    }

    fn submit<T: FromBytes + KnownLayout + Immutable>(&mut self, payload: &[u8]) -> Outcome<T> {
        let hdr = header(VIRTIO_GPU_CMD_SUBMIT_3D, CTX);
        let submit = CmdSubmit { hdr, size: (payload.len() as u32).into(), padding: 0.into() };
        let rest = self.send(&[submit.as_bytes(), payload].concat())?;
        T::read_from_prefix(&rest).map(|(reply, _)| reply).map_err(|_| format!("a reply of {rest:?}"))
    }
}

fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

fn request<T>(cmd: u32, tail: usize) -> ReqHdr {
    ReqHdr { cmd: cmd.into(), len: ((size_of::<T>() + tail) as u32).into(), ..ReqHdr::default() }
}

/// Whether a socket's other end is gone.
fn hung_up(socket: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, which is there; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}
