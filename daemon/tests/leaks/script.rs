//! A whole session as steps: messages of the VMM, and what its guest does in between. The VMM may leave after any of
//! them, and inside any message.

use crate::vmm::{Along, BASE, Back, MEMORY, MODULE, MODULE_GPA, Message, PAGES, Vmm, ring_at};
use daemon::session::FEATURES;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_JOB_DONE, FaultRecord, JobRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_CHASE, OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{CONFIG_SIZE, NUM_QUEUES};
use zerocopy::IntoBytes;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const PROTOCOL_FEATURES: u64 = 0xa209;
/// Without notifications by index, so that each used buffer interrupts.
const ACCEPTED: u64 = FEATURES & !(1 << VIRTIO_RING_F_EVENT_IDX);

/// CPU and GPU addresses of processes.
const A: u64 = 0x7f00_0000_0000;
const C: u64 = 0x4000_0000;
/// The page of an endless list.
const LOOP: u64 = 1;
/// Contexts of a session.
const CONTEXTS: u32 = 2;
/// Where nothing is shown.
const NULL: u64 = 1 << 40;

pub enum Step {
    Message(Message),
    Deed(Box<dyn Fn(&mut Vmm)>),
    /// A message whose contents are known only then.
    Late(Box<dyn Fn(&Vmm) -> Message>),
}

fn message(request: u32, payload: Vec<u8>, along: Along, back: Back) -> Step {
    Step::Message(Message { request, payload, along, back })
}
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}
fn deed(deed: impl Fn(&mut Vmm) + 'static) -> Step {
    Step::Deed(Box::new(deed))
}

/// All of it.
pub fn session() -> Vec<Step> {
    let mut steps = handshake();
    steps.extend(start_rings(true));
    steps.extend(life(1));
    steps.extend(pause());
    steps.push(deed(|vmm| _ = exec(vmm, 2, 2, &[fill(C + 4096 * 3, 8)])));
    steps.extend(hotplug());
    steps.push(message(RESET_DEVICE, vec![], Along::Nothing, Back::Ack));
    steps.push(message(SET_FEATURES, longs(&[ACCEPTED]), Along::Nothing, Back::Ack));
    steps.extend(start_rings(true));
    steps.extend(life(2));
    steps
}

/// Up to where the guest's driver comes in.
pub fn handshake() -> Vec<Step> {
    let none = Along::Nothing;
    let size = u32::try_from(CONFIG_SIZE).unwrap();
    vec![
        message(GET_FEATURES, vec![], none, Back::Data),
        message(SET_OWNER, vec![], none, Back::Nothing),
        message(GET_PROTOCOL_FEATURES, vec![], none, Back::Data),
        message(SET_PROTOCOL_FEATURES, longs(&[PROTOCOL_FEATURES]), none, Back::Nothing),
        message(GET_QUEUE_NUM, vec![], none, Back::Data),
        message(SET_FEATURES, longs(&[ACCEPTED]), none, Back::Ack),
        message(GET_CONFIG, [words(&[0, size, 0]), vec![0; CONFIG_SIZE]].concat(), none, Back::Data),
        memory_table(),
    ]
}
fn memory_table() -> Step {
    message(SET_MEM_TABLE, longs(&[1, 0, MEMORY, BASE, 0]), Along::Memory, Back::Ack)
}

fn start_rings(anew: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    if anew {
        steps.push(deed(Vmm::clear_rings));
    }
    for queue in 0..NUM_QUEUES {
        let index = u32::try_from(queue).unwrap();
        let ring = BASE + ring_at(queue);
        let areas = longs(&[ring, ring + 0x2000, ring + 0x1000, 0]);
        let set = |request, value| message(request, words(&[index, value]), Along::Nothing, Back::Ack);
        steps.push(set(SET_VRING_NUM, 16));
        steps.push(Step::Late(Box::new(move |vmm: &Vmm| Message {
            request: SET_VRING_BASE,
            payload: words(&[index, if anew { 0 } else { vmm.next(queue).into() }]),
            along: Along::Nothing,
            back: Back::Ack,
        })));
        steps.push(message(SET_VRING_ADDR, [words(&[index, 0]), areas].concat(), Along::Nothing, Back::Ack));
        let name = longs(&[index.into()]);
        steps.push(message(SET_VRING_CALL, name.clone(), Along::Call(queue), Back::Ack));
        steps.push(message(SET_VRING_KICK, name, Along::Kick(queue), Back::Ack));
        steps.push(set(SET_VRING_ENABLE, 1));
    }
    steps
}

/// Up to where its driver has posted buffers for events.
pub fn up() -> Vec<Step> {
    let mut steps = handshake();
    steps.extend(start_rings(true));
    steps.push(deed(Vmm::post_events));
    steps
}

/// A driver's life up to where faults are pending and jobs run.
fn life(incarnation: u64) -> Vec<Step> {
    let mut steps = vec![deed(Vmm::post_events), deed(move |vmm| hello(vmm, incarnation))];
    for ctx in 1..=CONTEXTS {
        steps.push(deed(move |vmm| create(vmm, ctx)));
        // A fault that is answered, and its job's end.
        steps.push(deed(move |vmm| work(vmm, ctx)));
        // One that is not.
        steps.push(deed(move |vmm| leave_pending(vmm, ctx)));
        // A list without an end.
        steps.push(deed(move |vmm| run_on(vmm, ctx)));
    }
    steps
}

fn pause() -> Vec<Step> {
    let stop = |queue| message(GET_VRING_BASE, words(&[queue, 0]), Along::Nothing, Back::Data);
    let mut steps: Vec<_> = [0, 1, 2].map(stop).into();
    steps.push(memory_table());
    steps.extend(start_rings(false));
    steps
}
fn hotplug() -> Vec<Step> {
    let module = longs(&[0, MODULE_GPA, MODULE, BASE + MODULE_GPA, 0]);
    vec![
        message(ADD_MEM_REG, module.clone(), Along::Module, Back::Ack),
        message(REM_MEM_REG, module, Along::Nothing, Back::Ack),
    ]
}

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}
pub fn hello(vmm: &mut Vmm, incarnation: u64) {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    let version = 0x1_0000.into();
    vmm.command(Hello { hdr, incarnation: incarnation.into(), version, reserved: 0.into() }.as_bytes());
}
/// The reply to a request of a process.
fn request(vmm: &mut Vmm, ctx: u32, cmd: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<ReqHdr>() + body.len()).unwrap();
    let req = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
    let submit = CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx), size: len.into(), padding: 0.into() };
    vmm.command(&[submit.as_bytes(), req.as_bytes(), body].concat()).split_off(size_of::<SvmResp>())
}
fn body(request: &[u8]) -> &[u8] {
    &request[size_of::<ReqHdr>()..]
}
/// A context with a GPU VM on each device that shows a few pages.
pub fn create(vmm: &mut Vmm, ctx: u32) {
    vmm.command(CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx), ..CtxCreate::default() }.as_bytes());
    for device in 0..2_u32 {
        let vm = VmCreate { dev_id: device.into(), ..VmCreate::default() };
        request(vmm, ctx, SVM_REQ_VM_CREATE, body(vm.as_bytes()));
        let pages = BindOp { obj_offset: A.into(), ..place(BIND_OP_MAP_USERPTR, 0, C, 4 * 4096) };
        bind(vmm, ctx, device + 1, &pages);
    }
}
fn place(op: u32, flags: u32, addr: u64, range: u64) -> BindOp {
    BindOp { op: op.into(), flags: flags.into(), addr: addr.into(), range: range.into(), ..BindOp::default() }
}
fn bind(vmm: &mut Vmm, ctx: u32, vm_id: u32, op: &BindOp) {
    let head = VmBind { vm_id: vm_id.into(), num_binds: 1.into(), ..VmBind::default() };
    request(vmm, ctx, SVM_REQ_VM_BIND, &[body(head.as_bytes()), op.as_bytes()].concat());
}
pub fn destroy(vmm: &mut Vmm, ctx: u32) {
    vmm.command(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx).as_bytes());
}
fn exec(vmm: &mut Vmm, ctx: u32, ring: u32, packets: &[Packet]) -> Vec<u8> {
    let count = u32::try_from(packets.len()).unwrap();
    let exec = Exec { vm_id: 1.into(), ring_idx: ring.into(), num_packets: count.into(), ..Exec::default() };
    request(vmm, ctx, SVM_REQ_EXEC, &[body(exec.as_bytes()), packets.as_bytes()].concat())
}
fn fill(dst: u64, bytes: u64) -> Packet {
    Packet { opcode: OP_FILL.into(), dst: dst.into(), len: bytes.into(), ..Packet::default() }
}
/// Guest-physical address of a process' page.
fn page(ctx: u32, page: u64) -> u64 {
    PAGES + (u64::from(ctx) * 4 + page) * 4096
}
fn supply(vmm: &mut Vmm, ctx: u32, cookie: u64, first: u64) {
    let run = PageRun {
        va: (A + first * 4096).into(),
        gpa: page(ctx, first).into(),
        pages: 1.into(),
        ..PageRun::default()
    };
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx);
    let answer =
        PageResponse { hdr, cookie: cookie.into(), code: 0.into(), num_runs: 1.into(), flags: 0.into() };
    vmm.command(&[answer.as_bytes(), run.as_bytes()].concat());
}
/// The next fault of the device that has them.
fn fault(vmm: &mut Vmm) -> FaultRecord {
    loop {
        let fault: FaultRecord = vmm.record(EVENT_FAULT);
        if fault.dev_id.get() == 0 {
            return fault;
        }
    }
}
fn job_ends_well(vmm: &mut Vmm, ctx: u32) {
    let end: JobRecord = vmm.record(EVENT_JOB_DONE);
    assert_eq!((end.ctx_id.get(), end.status.get()), (ctx, 0), "{end:?}");
}
/// A job that faults, the answer, its end.
pub fn work(vmm: &mut Vmm, ctx: u32) {
    exec(vmm, ctx, 0, &[fill(C, 8)]);
    let fault = fault(vmm);
    supply(vmm, ctx, fault.cookie.get(), 0);
    job_ends_well(vmm, ctx);
}
fn leave_pending(vmm: &mut Vmm, ctx: u32) {
    exec(vmm, ctx, 0, &[fill(C + 4096 * 2, 8)]);
    fault(vmm);
}
fn run_on(vmm: &mut Vmm, ctx: u32) {
    let node = C + LOOP * 4096;
    vmm.write(page(ctx, LOOP), &longs(&[node, 1]));
    let chase = Packet {
        opcode: OP_CHASE.into(),
        src: node.into(),
        dst: (node + 64).into(),
        value: u64::MAX.into(),
        ..Packet::default()
    };
    exec(vmm, ctx, 1, &[chase]);
    let fault = fault(vmm);
    supply(vmm, ctx, fault.cookie.get(), LOOP);
}
/// More faults than a host remembers, each served from what is known.
pub fn fault_often(vmm: &mut Vmm, ctx: u32) {
    bind(vmm, ctx, 1, &place(BIND_OP_MAP, BIND_NULL, NULL, 1 << 32));
    for half in 0..2_u64 {
        let touch = |block: u64| fill(NULL + ((half << 10) + block) * (2 << 20), 8);
        exec(vmm, ctx, 0, &(0..1024).map(touch).collect::<Vec<_>>());
        job_ends_well(vmm, ctx);
    }
}
