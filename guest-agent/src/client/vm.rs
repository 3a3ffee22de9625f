//! A GPU VM: the context's address space on one device (the C side).

use super::connection::{Connection, SubmitStatus};
use super::{Error, FencePoint, Job, Result, Window};
use crate::message::Reached;
use std::sync::Arc;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{
    BIND_CPU_ADDR_MIRROR, BIND_OP_MAP, BIND_OP_MAP_USERPTR, BIND_OP_UNMAP, BindOp, Exec, ExecRsp, ReqHdr,
    RspHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, SVM_REQ_VM_DESTROY, SVM_REQ_VM_GET_PROPERTY,
    VM_BIND_ASYNC, VmBind, VmBindRsp, VmCreate, VmCreateRsp, VmProperty, VmRef,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Packets, ready made (PROTOCOL 6). Addresses are GPU addresses.
pub mod packet {
    use virtio_gpu_svm::protocol::job::{
        OP_ATOMIC_ADD, OP_AXPY, OP_CHASE, OP_COPY, OP_FILL, OP_REDUCE, OP_SEM_SIGNAL, OP_SEM_WAIT, Packet,
    };

    /// `len` bytes from `src` to `dst`.
    pub fn copy(dst: u64, src: u64, len: u64) -> Packet {
        let (dst, src, len) = (dst.into(), src.into(), len.into());
        Packet { opcode: OP_COPY.into(), dst, src, len, ..Packet::default() }
    }

    /// `len` bytes at `dst` with the word `value`.
    pub fn fill(dst: u64, len: u64, value: u64) -> Packet {
        let (dst, len, value) = (dst.into(), len.into(), value.into());
        Packet { opcode: OP_FILL.into(), dst, len, value, ..Packet::default() }
    }

    /// The wrapping sum of the words in `len` bytes at `src`, to `dst`.
    pub fn reduce(dst: u64, src: u64, len: u64) -> Packet {
        let (dst, src, len) = (dst.into(), src.into(), len.into());
        Packet { opcode: OP_REDUCE.into(), dst, src, len, ..Packet::default() }
    }

    /// `y[i] += a * x[i]` over `len` bytes of f64.
    pub fn axpy(y: u64, x: u64, len: u64, a: f64) -> Packet {
        let (dst, src, len, value) = (y.into(), x.into(), len.into(), a.to_bits().into());
        Packet { opcode: OP_AXPY.into(), dst, src, len, value, ..Packet::default() }
    }

    /// Walks a list from `first`, whose links need `offset` added, for at most `limit` nodes; count and sum to `dst`.
    pub fn chase(dst: u64, first: u64, limit: u64, offset: u64) -> Packet {
        let (dst, src, value, arg) = (dst.into(), first.into(), limit.into(), offset.into());
        Packet { opcode: OP_CHASE.into(), dst, src, value, arg, ..Packet::default() }
    }

    /// Adds `value` to the word at `dst`, atomically.
    pub fn atomic_add(dst: u64, value: u64) -> Packet {
        Packet { opcode: OP_ATOMIC_ADD.into(), dst: dst.into(), value: value.into(), ..Packet::default() }
    }

    /// Waits until the word at `dst` is at least `value`.
    pub fn sem_wait(dst: u64, value: u64) -> Packet {
        Packet { opcode: OP_SEM_WAIT.into(), dst: dst.into(), value: value.into(), ..Packet::default() }
    }

    /// Stores `value` at `dst` after everything before it.
    pub fn sem_signal(dst: u64, value: u64) -> Packet {
        Packet { opcode: OP_SEM_SIGNAL.into(), dst: dst.into(), value: value.into(), ..Packet::default() }
    }
}

/// A GPU VM's state, as the device reports it.
pub type VmState = VmProperty;

/// A GPU VM. Destroyed with its context at the latest.
#[derive(Debug)]
pub struct Vm {
    connection: Arc<Connection>,
    created: VmCreateRsp,
    dev_id: u32,
    /// What it mirrors, for errors of jobs.
    pub(super) shown: Arc<[Window]>,
}

impl Vm {
    pub(super) fn create(connection: &Arc<Connection>, dev_id: u32) -> Result<Self> {
        let request = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
        let created = request_one(connection, "VM_CREATE", SVM_REQ_VM_CREATE, request.as_bytes(), &[])?;
        Ok(Self { connection: connection.clone(), created, dev_id, shown: Arc::default() })
    }

    /// Its number in the context.
    pub fn id(&self) -> u32 {
        self.created.vm_id.get()
    }

    /// Its id in the device's fault reports.
    pub fn asid(&self) -> u32 {
        self.created.asid.get()
    }

    /// The device.
    pub fn dev_id(&self) -> u32 {
        self.dev_id
    }

    /// GPU addresses are below `1 << va_bits`.
    pub fn va_bits(&self) -> u32 {
        self.created.va_bits.get()
    }

    /// Maps CPU addresses from `cpu` (A) to GPU addresses from `gpu` (C), `len` bytes. No page needs to be there yet:
    /// the first access of a job faults it in (on a device without faults jobs wait until it is there). `flags`: `BIND_*`.
    ///
    /// # Errors
    /// What the device says.
    pub fn bind_userptr(&self, gpu: u64, cpu: u64, len: u64, flags: u32) -> Result<()> {
        self.bind(&[BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            flags: flags.into(),
            addr: gpu.into(),
            range: len.into(),
            obj_offset: cpu.into(),
            ..BindOp::default()
        }])
    }

    /// Mirrors the process' CPU addresses at GPU addresses from `gpu` on, `len` bytes: CPU address = GPU address +
    /// `offset`. Costs nothing until a job touches it; with offset 0 every pointer is the same on both sides.
    ///
    /// # Errors
    /// What the device says.
    pub fn mirror(&self, gpu: u64, offset: i64, len: u64) -> Result<()> {
        self.bind(&[BindOp {
            op: BIND_OP_MAP.into(),
            flags: BIND_CPU_ADDR_MIRROR.into(),
            addr: gpu.into(),
            range: len.into(),
            obj_offset: offset.cast_unsigned().into(),
            ..BindOp::default()
        }])
    }

    /// Unmaps GPU addresses.
    ///
    /// # Errors
    /// What the device says.
    pub fn unbind(&self, gpu: u64, len: u64) -> Result<()> {
        let op =
            BindOp { op: BIND_OP_UNMAP.into(), addr: gpu.into(), range: len.into(), ..BindOp::default() };
        self.bind(&[op])
    }

    /// Changes mappings at once; all of `ops` take effect or none. [`Submission::bind`] does it in turn with jobs.
    ///
    /// # Errors
    /// What the device says; `detail` is the index of the operation.
    pub fn bind(&self, ops: &[BindOp]) -> Result<()> {
        let request = VmBind { vm_id: self.created.vm_id, num_binds: count(ops).into(), ..VmBind::default() };
        let (head, ops) = (request.as_bytes(), ops.as_bytes());
        request_one::<VmBindRsp>(&self.connection, "VM_BIND", SVM_REQ_VM_BIND, head, ops).map(|_| ())
    }

    /// Launches packets on a timeline. Jobs of one ring run in order, rings run side by side.
    ///
    /// # Errors
    /// What the device says. What goes wrong while it runs is told by [`Job::wait`].
    pub fn exec(&self, ring_idx: u32, packets: &[Packet], user_data: u64) -> Result<Job> {
        self.submit(ring_idx).user_data(user_data).exec(packets)
    }

    /// Begins work that waits for points or promises one:
    /// `vm.submit(0).wait(other.point(1, 7)).signal(3).exec(&packets)`.
    pub fn submit(&self, ring_idx: u32) -> Submission<'_> {
        Submission { vm: self, ring_idx, waits: Vec::new(), signal: 0, user_data: 0 }
    }

    /// A point of one of its timelines, to be waited for once it has been promised.
    pub fn point(&self, ring_idx: u32, seqno: u64) -> FencePoint {
        FencePoint { vm_id: self.created.vm_id, ring_idx: ring_idx.into(), seqno: seqno.into() }
    }

    /// Its state.
    ///
    /// # Errors
    /// What the device says.
    pub fn property(&self) -> Result<VmState> {
        let request = VmRef { vm_id: self.created.vm_id, ..VmRef::default() };
        request_one(&self.connection, "VM_GET_PROPERTY", SVM_REQ_VM_GET_PROPERTY, request.as_bytes(), &[])
    }

    /// Destroys it; its jobs end as cancelled.
    ///
    /// # Errors
    /// What the device says.
    pub fn destroy(self) -> Result<()> {
        let request = VmRef { vm_id: self.created.vm_id, ..VmRef::default() };
        request_one::<RspHdr>(&self.connection, "VM_DESTROY", SVM_REQ_VM_DESTROY, request.as_bytes(), &[])
            .map(|_| ())
    }
}

/// Work for a ring of a GPU VM, not yet submitted. What is submitted to a ring takes effect in that order.
#[must_use = "nothing is submitted before `exec` or `bind`"]
pub struct Submission<'a> {
    vm: &'a Vm,
    ring_idx: u32,
    waits: Vec<FencePoint>,
    signal: u64,
    user_data: u64,
}

impl Submission<'_> {
    /// Does not start before a point is reached, which must have been promised already ([`Vm::point`]).
    pub fn wait(mut self, point: FencePoint) -> Self {
        self.waits.push(point);
        self
    }

    /// Promises a point of the ring, greater than the last one; it is reached when this work has ended.
    pub fn signal(self, seqno: u64) -> Self {
        Self { signal: seqno, ..self }
    }

    /// A value of the program's own, repeated in the record of the end.
    pub fn user_data(self, user_data: u64) -> Self {
        Self { user_data, ..self }
    }

    /// Launches packets.
    ///
    /// # Errors
    /// What the device says; `detail` is the index of the packet or point. What goes wrong while it runs is told by
    /// [`Job::wait`].
    pub fn exec(self, packets: &[Packet]) -> Result<Job> {
        let request = Exec {
            vm_id: self.vm.created.vm_id,
            ring_idx: self.ring_idx.into(),
            num_packets: count(packets).into(),
            num_waits: count(&self.waits).into(),
            user_data: self.user_data.into(),
            signal: self.signal.into(),
            ..Exec::default()
        };
        let lists = [self.waits.as_bytes(), packets.as_bytes()].concat();
        let connection = &self.vm.connection;
        let reply: ExecRsp = request_one(connection, "EXEC", SVM_REQ_EXEC, request.as_bytes(), &lists)?;
        Ok(Job::new(connection.clone(), reply.job_id.get(), self.vm.shown.clone()))
    }

    /// Changes mappings in turn with what else is submitted to the ring; all of `ops` take effect or none. Where that
    /// fails, the GPU VM becomes unusable, and [`Job::wait`] tells the operation.
    ///
    /// # Errors
    /// What the device says of the operations and points themselves.
    pub fn bind(self, ops: &[BindOp]) -> Result<Job> {
        let request = VmBind {
            vm_id: self.vm.created.vm_id,
            num_binds: count(ops).into(),
            flags: VM_BIND_ASYNC.into(),
            ring_idx: self.ring_idx.into(),
            num_waits: count(&self.waits).into(),
            user_data: self.user_data.into(),
            signal: self.signal.into(),
            ..VmBind::default()
        };
        let lists = [self.waits.as_bytes(), ops.as_bytes()].concat();
        let connection = &self.vm.connection;
        let reply: VmBindRsp =
            request_one(connection, "VM_BIND", SVM_REQ_VM_BIND, request.as_bytes(), &lists)?;
        Ok(Job::new(connection.clone(), reply.job_id.get(), self.vm.shown.clone()))
    }
}

/// As a request says it; a list that is too long is refused by its length.
fn count<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

/// Sends one request and returns its reply. `request` opens with a header that is filled in here.
fn request_one<R: FromBytes + Immutable + KnownLayout>(
    connection: &Connection,
    what: &'static str,
    cmd: u32,
    request: &[u8],
    body: &[u8],
) -> Result<R> {
    let len = u32::try_from(request.len() + body.len()).unwrap_or(u32::MAX);
    let hdr = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
    let rest = request.get(size_of::<ReqHdr>()..).unwrap_or_default();
    let room = u32::try_from(size_of::<R>()).unwrap_or(u32::MAX);
    let (SubmitStatus { status, detail, limit }, area) =
        connection.submit(&[hdr.as_bytes(), rest, body], room)?;
    // The reply's own verdict is the more precise one; without it the request was not reached.
    match RspHdr::read_from_prefix(&area) {
        Ok((head, _)) if head.len.get() != 0 && head.ret.get() != 0 => {
            let (detail, limit) = (head.detail.get().into(), Reached::from_wire(head.limit.get().into()));
            Err(Error::Refused { what, status: head.ret.get(), detail, limit })
        }
        _ if status != 0 => Err(Error::Refused { what, status, detail, limit }),
        _ => match R::read_from_prefix(&area) {
            Ok((reply, _)) => Ok(reply),
            Err(_) => Err(Error::BadReply { what }),
        },
    }
}
