//! Processes at the broker, over real sockets: the library, and messages that no library would send.

use crate::agent::Bench;
use crate::mock::{FULL, eventually, file};
use crate::virtqueue::Random;
use guest_agent::agent::{AgentOptions, AgentStatus, LedgerReport};
use guest_agent::broker::{AdminRequest, Broker, BrokerOptions, ask_admin};
use guest_agent::client::{self, Client, Error, packet};
use guest_agent::message::*;
use guest_agent::socket::MessageSocket;
use std::path::PathBuf;
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_JOB_DONE};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{
    BIND_OP_MAP_USERPTR, BindOp, Exec, FencePoint, VM_BIND_ASYNC, VmBind,
};
use zerocopy::{FromBytes, IntoBytes};

pub struct Served {
    pub bench: Bench,
    _broker: Broker,
    directory: tempfile::TempDir,
}

impl Served {
    pub fn new(options: AgentOptions) -> Self {
        Self::limited(options, 64)
    }

    fn limited(options: AgentOptions, max_clients: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut broker = BrokerOptions::at(directory.path().join("agent.sock"));
        broker.admin_socket = Some(directory.path().join("admin.sock"));
        broker.max_clients = max_clients;
        let bench = Bench::new(options);
        let broker = Broker::start(bench.agent.clone(), broker).unwrap();
        Self { bench, _broker: broker, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    fn client(&self) -> Client {
        Client::connect(self.socket()).unwrap()
    }

    pub fn raw(&self) -> MessageSocket {
        let socket = MessageSocket::connect(&self.socket()).unwrap();
        socket.pass_credentials().unwrap();
        socket
    }
}

pub fn message(kind: u32, body: &[u8]) -> Vec<u8> {
    let head = Head { kind: kind.into(), seqno: 5.into(), status: 0.into(), reserved: 0.into() };
    [head.as_bytes(), body].concat()
}

/// Sends and returns the status of the reply; `None` when the agent hung up without one.
pub fn exchange(socket: &MessageSocket, bytes: &[u8]) -> Option<i32> {
    socket.send(&[bytes], &[], true).unwrap();
    let mut buf = vec![0; MAX_MESSAGE_BYTES];
    let received = socket.receive(&mut buf, true).ok().filter(|received| received.len > 0)?;
    let (head, _) = Head::read_from_prefix(&buf[..received.len]).unwrap();
    Some(head.status.get())
}

pub fn hang_up(socket: &MessageSocket) -> bool {
    let mut buf = [0; 256];
    // A reset also says that the other end is gone.
    socket.receive(&mut buf, true).map_or(true, |received| received.len == 0)
}

#[test]
fn program_runs_a_job_on_its_own_memory() {
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    assert_eq!(client.devices().unwrap().len(), 2);
    assert_eq!(client.devices().unwrap()[1].name, "mock");
    let at = 0x5151_0000_0000usize;
    let arena = client.arena(10_000, Some(at)).unwrap();
    assert_eq!((arena.address(), arena.len()), (at as u64, 12_288));
    arena.set_word(8, 99);
    assert_eq!(arena.word(8), 99);
    assert!(matches!(client.arena(4096, Some(at)), Err(Error::Map { .. })));
    let vm = client.vm(1).unwrap();
    vm.bind_userptr(0x4000_0000, arena.address(), 4096, 0).unwrap();
    vm.exec(0, &[Packet::default()], 7).unwrap().wait().unwrap();
    match vm.exec(0, &[packet::fill(0x123_4000, 8, 1)], 8).unwrap().wait() {
        Err(Error::Job(error)) => {
            assert_eq!((error.errno, error.addr), (14, 0x123_4000));
            assert!(error.to_string().contains("0x1234000 (write): EFAULT"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    vm.unbind(0x4000_0000, 4096).unwrap();
    vm.destroy().unwrap();
    arena.free().unwrap();
    eventually("released", || served.bench.memory.released.lock().unwrap().len() == 1);
}

fn userptr(gpu: u64) -> BindOp {
    let (addr, range) = (gpu.into(), 4096.into());
    BindOp { op: BIND_OP_MAP_USERPTR.into(), addr, range, ..BindOp::default() }
}

#[test]
fn submission_carries_its_points_before_its_list() {
    let served = Served::new(AgentOptions::default());
    let vm = served.client().vm(0).unwrap();
    let points = [vm.point(1, 7), vm.point(63, u64::MAX)];
    let waiting = || vm.submit(3).wait(points[0]).wait(points[1]).signal(5).user_data(6);
    waiting().exec(&[Packet::default()]).unwrap().wait().unwrap();
    let mut bind = waiting().bind(&[userptr(0x1000), userptr(0x2000)]).unwrap();
    let end = bind.record().unwrap();
    assert_eq!((end.job_id.get(), end.point.get(), end.user_data.get()), (bind.id(), 5, 6));
    let sent = served.bench.mock.script(|script| script.submissions.clone());
    let (exec, lists) = Exec::read_from_prefix(&sent[1]).unwrap();
    assert_eq!((exec.ring_idx.get(), exec.num_waits.get(), exec.signal.get()), (3, 2, 5));
    assert_eq!(lists, [points.as_bytes(), Packet::default().as_bytes()].concat());
    let (bind, lists) = VmBind::read_from_prefix(&sent[2]).unwrap();
    assert_eq!((bind.ring_idx.get(), bind.flags.get()), (3, VM_BIND_ASYNC));
    assert_eq!((bind.num_waits.get(), bind.num_binds.get(), bind.signal.get()), (2, 2, 5));
    assert_eq!(lists.len(), 2 * size_of::<FencePoint>() + 2 * size_of::<BindOp>());
}

#[test]
fn failed_bind_names_its_operation_and_leaves_the_connection() {
    let served = Served::new(AgentOptions::default());
    let vm = served.client().vm(0).unwrap();
    match vm.submit(0).bind(&[userptr(0x1000), userptr(FULL)]).unwrap().wait() {
        Err(Error::Job(error)) => {
            assert!(error.bind);
            assert_eq!((error.errno, error.packet, error.addr), (28, 1, FULL));
            let text = error.to_string();
            assert!(text.starts_with("operation 1 failed at GPU address 0xf0000: ENOSPC; "), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // One GPU VM is dead; jobs of others still end.
    vm.exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
    vm.exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
}

#[test]
fn several_threads_wait_for_their_own_jobs() {
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let client = client.clone();
            scope.spawn(move || {
                let vm = client.vm(0).unwrap();
                for round in 0..50 {
                    let user_data = thread * 1000 + round;
                    let mut job = vm.exec(0, &[Packet::default()], user_data).unwrap();
                    assert_eq!(job.record().unwrap().user_data.get(), user_data);
                }
            });
        }
    });
}

#[test]
fn context_ends_with_its_connection() {
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    let arena = client.arena_as_if_at(4096, 0x7000_0000).unwrap();
    assert_eq!(served.bench.agent.status().contexts.len(), 1);
    drop((arena, client));
    eventually("destroyed", || served.bench.agent.status().contexts.is_empty());
    eventually("released", || served.bench.memory.released.lock().unwrap().len() == 1);
}

fn hello_joining(ctx_id: u32) -> Vec<u8> {
    message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: ctx_id.into() }.as_bytes())
}

/// One connection has the memory, another one launches jobs on it and gets the records.
#[test]
fn second_connection_of_a_process_joins_its_context() {
    let served = Served::new(AgentOptions::default());
    let owner = served.raw();
    assert_eq!(exchange(&owner, &hello_joining(0)), Some(0));
    let ctx_id = served.bench.agent.status().contexts[0].ctx_id;
    let create = ArenaCreate { len: 4096.into(), va: 0x7000_0000.into() };
    assert_eq!(exchange(&owner, &message(ARENA_CREATE, create.as_bytes())), Some(0));
    for round in 0..3 {
        let mut joined = served.raw();
        eventually(&format!("room in round {round}"), || {
            joined = served.raw();
            exchange(&joined, &hello_joining(ctx_id)) == Some(0)
        });
        // One at a time.
        assert_eq!(exchange(&served.raw(), &hello_joining(ctx_id)), Some(-16));
        // The same memory.
        assert_eq!(exchange(&joined, &message(ARENA_CREATE, create.as_bytes())), Some(-17));
        served.bench.mock.script(|script| script.notice(EVENT_JOB_DONE, ctx_id, 1));
        let mut buf = [0; 256];
        let received = joined.receive(&mut buf, true).unwrap();
        assert_eq!(Head::read_from_prefix(&buf[..received.len]).unwrap().0.kind.get(), EVENTS);
        drop(joined);
        // Its end ends nothing else. A record that comes now is nobody's.
        eventually("room for another", || exchange(&served.raw(), &hello_joining(ctx_id)) == Some(0));
        served.bench.mock.script(|script| script.notice(EVENT_JOB_DONE, ctx_id, 2));
        eventually("and it has left", || {
            let next = served.raw();
            exchange(&next, &hello_joining(ctx_id)) == Some(0)
        });
    }
    assert_eq!(exchange(&owner, &message(DEVICES, &[])), Some(0));
    let joined = served.raw();
    eventually("a last one", || exchange(&joined, &hello_joining(ctx_id)) == Some(0));
    drop(owner);
    eventually("the context ends with its opener", || served.bench.agent.status().contexts.is_empty());
    assert_eq!(exchange(&joined, &message(ARENA_CREATE, create.as_bytes())), Some(-32));
    assert_eq!(exchange(&served.raw(), &hello_joining(ctx_id)), Some(-2));
    assert_eq!(exchange(&served.raw(), &hello_joining(ctx_id + 1)), Some(-2));
}

#[test]
fn lost_context_is_told_to_the_program() {
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    let vm = client.vm(0).unwrap();
    let job = vm.exec(0, &[Packet::default()], 0).unwrap();
    job.wait().unwrap();
    served.bench.mock.script(|script| script.lose_state());
    let lost = vm.exec(0, &[Packet::default()], 0).map(|_| ());
    assert!(matches!(lost, Err(Error::Refused { status: -32, .. })), "{lost:?}");
    // The refusal may be here before the agent has begun the new life.
    let hellos = || served.bench.mock.look().log.iter().filter(|line| *line == "hello").count();
    eventually("a new life", || hellos() == 2 && served.bench.agent.check_open().is_ok());
    served.client().vm(0).unwrap();
}

/// Every message that breaks the rules gets an error and a hang-up, and leaves no context behind.
#[test]
fn hostile_messages_end_the_connection() {
    let served = Served::new(AgentOptions::default());
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    let good = message(HELLO, hello.as_bytes());
    let mut status_set = good.clone();
    status_set[8] = 1;
    let mut reserved_set = message(DEVICES, &[]);
    reserved_set[12] = 1;
    let submit = |reply_len: u32, reserved: u32, payload: &[u8]| {
        let submit = Submit { reply_len: reply_len.into(), reserved: reserved.into() };
        message(SUBMIT, &[submit.as_bytes(), payload].concat())
    };
    let before_hello: Vec<(&str, Vec<u8>, i32)> = vec![
        ("one byte", vec![1], -22),
        ("head cut", good[..15].to_vec(), -22),
        ("status set", status_set, -22),
        ("body cut", good[..good.len() - 1].to_vec(), -22),
        ("body too long", [&good[..], &[0]].concat(), -22),
        ("other version", message(HELLO, Hello { version: 9.into(), ..hello }.as_bytes()), -95),
        ("request before HELLO", message(DEVICES, &[]), -22),
        ("unknown kind", message(77, &[]), -22),
        ("pushed kind", message(EVENTS, &[0; 96]), -22),
        ("too large", message(SUBMIT, &vec![0; MAX_MESSAGE_BYTES]), -22),
    ];
    let after_hello: Vec<(&str, Vec<u8>, i32)> = vec![
        ("second HELLO", good.clone(), -22),
        ("reserved in the head", reserved_set, -22),
        ("DEVICES with a body", message(DEVICES, &[0]), -22),
        ("ARENA_CREATE cut", message(ARENA_CREATE, &[0; 15]), -22),
        ("ARENA_FREE too long", message(ARENA_FREE, &[0; 9]), -22),
        ("ARENA_CUT cut", message(ARENA_CUT, &[0; 23]), -22),
        ("ARENA_PIN cut", message(ARENA_PIN, &[0; 23]), -22),
        ("SUBMIT cut", message(SUBMIT, &[0; 7]), -22),
        ("SUBMIT without payload", submit(16, 0, &[]), -22),
        ("SUBMIT reply too large", submit(MAX_REPLY_BYTES + 1, 0, &[0; 16]), -22),
        ("SUBMIT reserved", submit(16, 1, &[0; 16]), -22),
    ];
    let cases =
        before_hello.into_iter().map(|case| (false, case)).chain(after_hello.into_iter().map(|c| (true, c)));
    for (greeted, (name, bytes, status)) in cases {
        let socket = served.raw();
        if greeted {
            assert_eq!(exchange(&socket, &good), Some(0), "{name}");
        }
        assert_eq!(exchange(&socket, &bytes), Some(status), "{name}");
        assert!(hang_up(&socket), "{name}");
    }
    eventually("no context is left", || served.bench.agent.status().contexts.is_empty());
}

#[test]
fn refused_requests_leave_the_connection_alone() {
    let served = Served::new(AgentOptions::default());
    let socket = served.raw();
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    assert_eq!(exchange(&socket, &message(HELLO, hello.as_bytes())), Some(0));
    let unaligned = ArenaCreate { len: 4096.into(), va: 1.into() };
    assert_eq!(exchange(&socket, &message(ARENA_CREATE, unaligned.as_bytes())), Some(-22));
    assert_eq!(
        exchange(&socket, &message(ARENA_FREE, ArenaFree { arena_id: 9.into() }.as_bytes())),
        Some(-2)
    );
    let cut = |arena_id: u64, offset: u64, len: u64| {
        let cut = ArenaCut { arena_id: arena_id.into(), offset: offset.into(), len: len.into() };
        exchange(&socket, &message(ARENA_CUT, cut.as_bytes()))
    };
    assert_eq!(cut(9, 0, 4096), Some(-2));
    let create = ArenaCreate { len: (8 * 4096).into(), va: 0x7000_0000.into() };
    assert_eq!(exchange(&socket, &message(ARENA_CREATE, create.as_bytes())), Some(0));
    assert_eq!((cut(1, 4096, u64::MAX), cut(1, 1, 4096), cut(1, 4096, 0)), (Some(-22), Some(-22), Some(-22)));
    assert_eq!((cut(1, 4096, 4096), cut(1, 4096, 4096)), (Some(0), Some(-2)));
    assert_eq!(exchange(&socket, &message(DEVICES, &[])), Some(0));
}

#[test]
fn arena_of_another_program_does_not_exist() {
    let served = Served::new(AgentOptions::default());
    let victim = served.client();
    let arena = victim.arena_as_if_at(4096, 0x7000_0000).unwrap();
    let socket = served.raw();
    let hello = message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: 0.into() }.as_bytes());
    assert_eq!(exchange(&socket, &hello), Some(0));
    for arena_id in (0..64).chain([u64::MAX]) {
        let free = message(ARENA_FREE, ArenaFree { arena_id: arena_id.into() }.as_bytes());
        assert_eq!(exchange(&socket, &free), Some(-2), "arena {arena_id}");
    }
    assert!(served.bench.memory.released.lock().unwrap().is_empty());
    arena.free().unwrap();
    eventually("released", || served.bench.memory.released.lock().unwrap().len() == 1);
}

#[test]
fn program_that_dies_mid_fault_keeps_its_pages_until_engines_let_go() {
    let served = Served::new(AgentOptions { hold_answers: true, ..AgentOptions::default() });
    let Served { bench, .. } = &served;
    let client = served.client();
    let arena = client.arena_as_if_at(4096, 0x7000_0000).unwrap();
    let ctx_id = bench.agent.status().contexts[0].ctx_id;
    bench.mock.script(|script| script.hold_retired = true);
    bench.mock.script(|script| script.fault(ctx_id, 0x7000_0000));
    eventually("an answer to be held", || bench.agent.ledger(false).held == 1);
    drop((arena, client));
    let is_retiring = |id: u32| {
        let contexts = bench.agent.status().contexts;
        contexts.iter().any(|context| context.ctx_id == id && context.state == "retiring")
    };
    eventually("the context to go", || is_retiring(ctx_id));
    bench.agent.release_answers();
    // Another one is served meanwhile, and by then the answer has been sent if it ever is.
    served.client().vm(0).unwrap();
    assert!(bench.mock.look().answers.iter().all(|answer| answer.status != 0 || answer.code != 0));
    assert!(bench.memory.released.lock().unwrap().is_empty(), "pages are free and engines may use them");
    bench.mock.script(|script| script.notice(EVENT_CONTEXT_RETIRED, ctx_id, 0));
    eventually("released", || bench.memory.released.lock().unwrap().len() == 1);
}

#[test]
fn message_with_a_descriptor_is_refused() {
    use std::os::fd::AsFd;
    let served = Served::new(AgentOptions::default());
    let socket = served.raw();
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    let bytes = message(HELLO, hello.as_bytes());
    let stdin = std::io::stdin();
    socket.send(&[&bytes], &[stdin.as_fd()], true).unwrap();
    let mut buf = [0; 64];
    let received = socket.receive(&mut buf, true).unwrap();
    assert_eq!(Head::read_from_prefix(&buf[..received.len]).unwrap().0.status.get(), -22);
    assert!(hang_up(&socket));
}

/// One message comes with one descriptor; what is wrong with it is told, and the connection goes on.
#[test]
fn memory_of_a_process_comes_with_its_message() {
    use std::os::fd::{AsFd, BorrowedFd};
    let served = Served::new(AgentOptions::default());
    let import = |len: u64, offset: u64| {
        let body = ArenaImport { len: len.into(), va: 0x7000_0000.into(), offset: offset.into() };
        message(ARENA_IMPORT, body.as_bytes())
    };
    let greeted = || {
        let socket = served.raw();
        assert_eq!(exchange(&socket, &hello_joining(0)), Some(0));
        socket
    };
    let send = |socket: &MessageSocket, bytes: &[u8], fds: &[BorrowedFd<'_>]| {
        socket.send(&[bytes], fds, true).unwrap();
        let mut buf = [0; 256];
        let received = socket.receive(&mut buf, true).unwrap();
        let (head, body) = Head::read_from_prefix(&buf[..received.len]).unwrap();
        let reply = ArenaReply::read_from_bytes(body).ok();
        assert!(received.fds.is_empty());
        (head.status.get(), reply.map(|reply| (reply.arena_id.get(), reply.offset.get())))
    };
    let brought = file(3 * 4096);
    let brought = brought.as_fd();
    for (name, fds) in [("none", vec![]), ("two", vec![brought; 2]), ("eight", vec![brought; 8])] {
        let socket = greeted();
        assert_eq!(send(&socket, &import(4096, 0), &fds).0, -22, "{name}");
        assert!(hang_up(&socket), "{name}");
    }
    let socket = greeted();
    assert_eq!(send(&socket, &import(4096, 0)[..39], &[brought]).0, -22, "cut");
    assert!(hang_up(&socket));

    let socket = greeted();
    let disk = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(send(&socket, &import(4096, 0), &[disk.as_fd()]), (-13, None));
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(send(&socket, &import(4096, 0), &[event.as_fd()]), (-95, None));
    assert_eq!(send(&socket, &import(4 * 4096, 0), &[brought]), (-22, None));
    assert_eq!(send(&socket, &import(4096, 100), &[brought]), (-22, None));
    *served.bench.memory.refusal.lock().unwrap() = Some(std::io::Error::from_raw_os_error(11));
    assert_eq!(send(&socket, &import(4096, 0), &[brought]), (-11, None));
    assert_eq!(send(&socket, &import(2 * 4096, 4096), &[brought]), (0, Some((1, 4096))));
    let free = ArenaFree { arena_id: 1.into() };
    assert_eq!(exchange(&socket, &message(ARENA_FREE, free.as_bytes())), Some(0));
}

/// A child process that inherited the socket is not the one that connected.
#[test]
fn inherited_socket_gives_no_right() {
    use std::os::fd::AsFd;
    let served = Served::new(AgentOptions::default());
    let socket = served.raw();
    let hello = message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: 0.into() }.as_bytes());
    assert_eq!(exchange(&socket, &hello), Some(0));
    let directory = served.directory.path();
    std::fs::write(directory.join("message"), message(DEVICES, &[])).unwrap();
    let child = std::process::Command::new("/bin/cat")
        .arg(directory.join("message"))
        .stdout(std::process::Stdio::from(socket.as_fd().try_clone_to_owned().unwrap()))
        .status();
    assert!(child.unwrap().success());
    let mut buf = [0; 64];
    let received = socket.receive(&mut buf, true).unwrap();
    assert_eq!(Head::read_from_prefix(&buf[..received.len]).unwrap().0.status.get(), -13);
    assert!(hang_up(&socket));
    eventually("destroyed", || served.bench.agent.status().contexts.is_empty());
}

/// A program that launches and never reads is disconnected; another one is served all the while.
#[test]
fn program_that_does_not_read_is_disconnected() {
    let served = Served::new(AgentOptions::default());
    let socket = served.raw();
    let hello = message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: 0.into() }.as_bytes());
    assert_eq!(exchange(&socket, &hello), Some(0));
    let ctx_id = served.bench.agent.status().contexts[0].ctx_id;
    let other = served.client();
    let vm = other.vm(0).unwrap();
    for _ in 0..200 {
        served.bench.mock.script(|script| (0..100).for_each(|_| script.notice(EVENT_JOB_DONE, ctx_id, 1)));
        vm.exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
    }
    eventually("only the other is left", || served.bench.agent.status().contexts.len() == 1);
    assert_eq!(served.bench.agent.status().contexts[0].ctx_id, other.ctx_id());
}

/// One step of a program that means no good. False: it leaves.
fn misbehave(socket: &MessageSocket, random: &mut Random) -> bool {
    use std::os::fd::AsFd;
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    let va = random.below(4) << 40 | random.below(64) << 12;
    let len = [4096, 1 << 20, 1 << 40, u64::MAX, 0, 5][random.below(6) as usize];
    let bytes = match random.below(11) {
        0..3 => message(HELLO, hello.as_bytes()),
        3 => message(ARENA_CREATE, ArenaCreate { len: len.into(), va: va.into() }.as_bytes()),
        4 => message(ARENA_CREATE, ArenaCreate { len: 4096.into(), va: va.into() }.as_bytes()),
        5 => message(ARENA_FREE, ArenaFree { arena_id: random.below(40).into() }.as_bytes()),
        6 => message(SUBMIT, &vec![0xff; 9 + random.below(100_000) as usize]),
        7 => vec![0xff; random.below(64) as usize],
        8 => {
            let (arena_id, offset) = (random.below(40).into(), (random.below(4) << 12).into());
            message(ARENA_CUT, ArenaCut { arena_id, offset, len: 4096.into() }.as_bytes())
        }
        9 => {
            let body =
                ArenaImport { len: 4096.into(), va: va.into(), offset: (random.below(4) << 12).into() };
            message(ARENA_IMPORT, body.as_bytes())
        }
        _ => return false,
    };
    let (inherited, memory) = (std::io::stdin(), file(2 * 4096));
    let fds = match random.below(20) {
        0 => vec![inherited.as_fd(); 3],
        1..10 if bytes.first() == Some(&6) => vec![memory.as_fd()],
        _ => Vec::new(),
    };
    let sent = socket.send(&[&bytes], &fds, false);
    if random.below(2) == 0 {
        // Reads what is there, perhaps not what it asked for; otherwise never.
        drop(socket.receive(&mut [0; 4096], false));
    }
    sent.is_ok() && !bytes.is_empty()
}

/// Many programs send nonsense in any order, do not read, and leave at any step. One that behaves is served all the
/// while and keeps its memory; of the others nothing stays.
#[test]
fn hostile_programs_do_not_disturb_another() {
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    let arena = client.arena_as_if_at(4096, 0x7000_0000).unwrap();
    let vm = client.vm(0).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut random = Random::seeded();
                for _ in 0..150 {
                    let socket = served.raw();
                    while misbehave(&socket, &mut random) {}
                }
            });
        }
        for _ in 0..100 {
            vm.exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
        }
    });
    eventually("only one is left", || served.bench.agent.status().contexts.len() == 1);
    vm.exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
    let status = served.bench.agent.status();
    assert_eq!((status.contexts[0].ctx_id, status.pinned_bytes), (client.ctx_id(), 4096));
    // The first arena is this one's.
    assert!(!served.bench.memory.released.lock().unwrap().contains(&1));
    arena.free().unwrap();
}

#[test]
fn broker_that_closes_hangs_up_on_everybody() {
    let Served { bench, _broker: broker, directory } = Served::new(AgentOptions::default());
    let socket = MessageSocket::connect(&directory.path().join("agent.sock")).unwrap();
    socket.pass_credentials().unwrap();
    assert_eq!(exchange(&socket, &hello_joining(0)), Some(0));
    broker.close(std::time::Duration::from_secs(60));
    assert!(hang_up(&socket));
    eventually("nothing is left", || bench.agent.status().contexts.is_empty());
}

#[test]
fn too_many_programs_are_turned_away() {
    let served = Served::limited(AgentOptions::default(), 2);
    let first = served.client();
    let second = served.client();
    assert!(matches!(Client::connect(served.socket()), Err(Error::HungUp | Error::Socket(_))));
    drop(first);
    eventually("room again", || Client::connect(served.socket()).is_ok());
    drop(second);
}

#[test]
fn operator_sees_contexts_and_the_ledger_and_releases_answers() {
    let served = Served::new(AgentOptions { hold_answers: true, ..AgentOptions::default() });
    let admin = served.directory.path().join("admin.sock");
    let client = served.client();
    let arena = client.arena_as_if_at(4096, 0x7000_0000).unwrap();
    let status: AgentStatus = ask_admin(&admin, AdminRequest::Status).unwrap();
    assert_eq!(status.contexts.len(), 1);
    assert_eq!(status.contexts[0].owner.pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!((status.pinned_bytes, status.holding_answers), (4096, true));
    served.bench.mock.script(|script| script.fault(client.ctx_id(), arena.address()));
    eventually("held", || served.bench.agent.ledger(false).held == 1);
    let released: serde_json::Value = ask_admin(&admin, AdminRequest::Release).unwrap();
    assert_eq!(released, serde_json::json!({ "released": 1 }));
    eventually("answered", || served.bench.agent.ledger(false).answered == 1);
    let ledger: LedgerReport = ask_admin(&admin, AdminRequest::Ledger).unwrap();
    assert_eq!(ledger.entries[0].cpu_addr, 0x7000_0000);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&admin).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(served.socket()).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn absent_agent_is_said_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let absent = client::Client::connect(directory.path().join("none.sock")).map(|_| ()).unwrap_err();
    assert!(absent.to_string().contains("start `svm-agent serve`"), "{absent}");
}
