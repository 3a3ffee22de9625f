//! Processes at the broker, over real sockets: the library, and messages that no library would send.

use crate::agent::Bench;
use crate::mock::{FULL, eventually, file};
use crate::virtqueue::Random;
use guest_agent::agent::{ARENA_OVERHEAD_BYTES, AgentOptions, AgentStatus, LedgerReport};
use guest_agent::broker::{AdminRequest, Broker, BrokerOptions, ask_admin};
use guest_agent::client::{self, Client, Error, packet};
use guest_agent::mapping::{Placement, SharedMapping};
use guest_agent::message::*;
use guest_agent::socket::MessageSocket;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_JOB_DONE};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::limit::Limit;
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
        Self::with(options, |broker| broker.max_clients_per_uid = max_clients)
    }

    fn with(options: AgentOptions, choose: impl FnOnce(&mut BrokerOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut broker = BrokerOptions::at(directory.path().join("agent.sock"));
        broker.admin_socket = Some(directory.path().join("admin.sock"));
        choose(&mut broker);
        let bench = Bench::new(options);
        let broker = Broker::start(bench.agent.clone(), broker).unwrap();
        Self { bench, _broker: broker, directory }
    }

    pub fn socket(&self) -> PathBuf {
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

/// Sends and returns the status of the reply; `None` when the agent hung up without one. Records that come before are
/// passed over.
pub fn exchange(socket: &MessageSocket, bytes: &[u8]) -> Option<i32> {
    socket.send(&[bytes], &[], true).unwrap();
    let mut buf = vec![0; MAX_MESSAGE_BYTES];
    loop {
        let received = socket.receive(&mut buf, true).ok().filter(|received| received.len > 0)?;
        let (head, _) = Head::read_from_prefix(&buf[..received.len]).unwrap();
        // A refusal has the kind of what is refused.
        if head.kind.get() != EVENTS || head.status.get() != 0 {
            return Some(head.status.get());
        }
    }
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
    let at = 0x5050_0000_0000usize;
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

/// Numbers of contexts go round. Who had joined one that has ended reaches nothing of the process that has its number
/// next: no memory, no job, no record.
#[test]
fn joined_connection_does_not_enter_who_has_the_number_next() {
    let served = Served::new(AgentOptions { last_ctx_id: 2, ..AgentOptions::default() });
    let owner = served.raw();
    assert_eq!(exchange(&owner, &hello_joining(0)), Some(0));
    let joined = served.raw();
    assert_eq!(exchange(&joined, &hello_joining(1)), Some(0));
    drop(owner);
    let contexts = || served.bench.agent.status().contexts;
    eventually("the context ends with its opener", || contexts().is_empty());
    let next = [served.client(), served.client()];
    assert_eq!(next.each_ref().map(Client::ctx_id), [2, 1]);
    let victim = &next[1];
    let arena = victim.arena_as_if_at(4096, 0x7000_0000).unwrap();
    // Memory is numbered as it is made.
    let id = 1;
    let create = ArenaCreate { len: 4096.into(), va: 0x7100_0000.into() };
    let cut = ArenaCut { arena_id: id.into(), offset: 0.into(), len: 4096.into() };
    let submit = Submit { reply_len: 16.into(), reserved: 0.into() };
    for bytes in [
        message(ARENA_CREATE, create.as_bytes()),
        message(ARENA_CUT, cut.as_bytes()),
        message(ARENA_FREE, ArenaFree { arena_id: id.into() }.as_bytes()),
        message(SUBMIT, &[submit.as_bytes(), &[0xff; 16]].concat()),
    ] {
        assert_eq!(exchange(&joined, &bytes), Some(-32));
    }
    drop(joined);
    victim.vm(0).unwrap().exec(0, &[Packet::default()], 0).unwrap().wait().unwrap();
    assert_eq!(contexts().iter().map(|context| context.arenas).sum::<usize>(), 1);
    arena.free().unwrap();
}

/// Who opened a context that the daemon has lost ends no other one, and hides no other one from those who join.
#[test]
fn opener_of_a_lost_context_does_not_end_who_has_the_number_next() {
    let served = Served::limited(AgentOptions { last_ctx_id: 2, ..AgentOptions::default() }, 3);
    let opener = served.raw();
    assert_eq!(exchange(&opener, &hello_joining(0)), Some(0));
    served.bench.mock.script(|script| {
        script.lose_state();
        script.notice(EVENT_JOB_DONE, 0u32, 0);
    });
    let hellos = || served.bench.mock.look().log.iter().filter(|line| *line == "hello").count();
    eventually("a new life", || hellos() == 2 && served.bench.agent.check_open().is_ok());
    let next = [served.client(), served.client()];
    assert_eq!(next.each_ref().map(Client::ctx_id), [2, 1]);
    drop(opener);
    // There is room for another connection once that one has ended.
    let mut joined = None;
    eventually("room", || {
        joined = MessageSocket::connect(&served.socket()).ok().filter(|socket| {
            socket.pass_credentials().unwrap();
            let sent = socket.send(&[&hello_joining(1)], &[], true);
            let mut buf = [0; 256];
            let received = sent.and_then(|()| socket.receive(&mut buf, true));
            received.is_ok_and(|received| received.len > 0 && buf[8..12] == [0; 4])
        });
        joined.is_some()
    });
    let contexts = served.bench.agent.status().contexts;
    assert!(contexts.len() == 2 && contexts.iter().all(|context| context.state == "alive"), "{contexts:?}");
    next[1].vm(0).unwrap();
}

/// Other threads map memory all the while: nothing of theirs comes where an arena is to stand, and none is refused.
#[test]
fn arena_takes_its_place_while_other_threads_map_memory() {
    const LEN: usize = 64 << 10;
    let served = Served::new(AgentOptions::default());
    let client = served.client();
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let file = file(LEN as u64);
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    let map = || SharedMapping::new(file.as_fd(), 0, LEN, Placement::Anywhere).unwrap();
                    drop([map(), map(), map()]);
                }
            });
        }
        let made = (0..500).map(|n| {
            let arena = client.arena(LEN, None)?;
            arena.set_word(0, n);
            let found = arena.word(0);
            arena.free().map(|()| found)
        });
        let made: Result<Vec<u64>, Error> = made.collect();
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(made.unwrap().into_iter().eq(0..500));
    });
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
    use std::os::fd::BorrowedFd;
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

/// What the library says of a refusal of -ENOSPC, and the limit that it is about.
fn reached(refused: Result<impl std::fmt::Debug, Error>) -> (Option<Reached>, String) {
    match refused {
        Err(error @ Error::Refused { status: -28, limit, .. }) => (limit, error.to_string()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn too_many_programs_are_told_which_limit_they_meet() {
    let served = Served::with(AgentOptions::default(), |broker| broker.max_clients = 3);
    // Others than root have half of them.
    let mut clients = vec![];
    let beyond = loop {
        match Client::connect(served.socket()) {
            Ok(client) => clients.push(client),
            refused => break refused,
        }
    };
    let (limit, said) = reached(beyond);
    assert_eq!(limit, Some(Reached::Agent(AgentLimit::Clients)));
    assert!(said.contains("HELLO: ENOSPC") && said.contains("--max-clients of `svm-agent serve`"), "{said}");
    drop(clients.remove(0));
    eventually("room again", || Client::connect(served.socket()).is_ok());
    drop(clients);

    let of_user = Served::with(AgentOptions::default(), |broker| broker.max_clients_per_uid = 1);
    let only = of_user.client();
    let (limit, said) = reached(Client::connect(of_user.socket()));
    assert_eq!(limit, Some(Reached::Agent(AgentLimit::UserClients)));
    assert!(said.contains("--max-clients-per-user"), "{said}");
    drop(only);

    let of_host = Served::new(AgentOptions::default());
    of_host.bench.mock.script(|script| script.max_contexts = 0);
    let (limit, said) = reached(Client::connect(of_host.socket()));
    assert_eq!(limit, Some(Reached::Host(Limit::Contexts)));
    assert!(said.contains("limits.contexts in svmd.toml"), "{said}");
}

/// Programs beyond the limit that say nothing, or not what is asked of them, and never read.
#[test]
fn program_that_is_turned_away_delays_nobody() {
    let served = Served::limited(AgentOptions::default(), 1);
    let only = served.client();
    let silent: Vec<MessageSocket> = (0..100).map(|_| served.raw()).collect();
    let wrong = served.raw();
    wrong.send(&[&message(DEVICES, &[])], &[], true).unwrap();
    assert!(hang_up(&wrong));
    let empty = served.raw();
    empty.send(&[&[1, 2, 3]], &[], true).unwrap();
    assert!(hang_up(&empty));
    let hello = message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: 0.into() }.as_bytes());
    let (deaf, own) =
        (served.raw(), rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
    deaf.send(&[&hello], &[own.as_fd()], true).unwrap();
    let (limit, _) = reached(Client::connect(served.socket()));
    assert_eq!(limit, Some(Reached::Agent(AgentLimit::UserClients)));
    // Those that were silent for longest were hung up on, and the others are still heard.
    assert!(hang_up(&silent[0]));
    assert_eq!(exchange(&silent[99], &hello), Some(-28));
    drop(only);
    eventually("room again", || Client::connect(served.socket()).is_ok());
}

/// A descriptor whose last close waits until the other end has read everything.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (reader, _) = listener.accept().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&sender, Some(Duration::from_secs(600))).unwrap();
    (reader, sender)
}

/// Reads until whoever closes the other end is through.
fn let_close(mut reader: TcpStream) {
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
}

/// A process decides how long it takes to close what it sends, and keeps nobody by it: not when it is dropped unread with
/// a context, either.
#[test]
fn descriptor_that_is_slow_to_close_delays_nobody() {
    let served = Served::new(AgentOptions::default());
    let victim = served.client();
    let (reader, sender) = lingering();
    loop {
        let hostile = served.raw();
        let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
        assert_eq!(exchange(&hostile, &message(HELLO, hello.as_bytes())), Some(0));
        // The first one ends the connection, so the other one stays in the socket, if it comes in time.
        hostile.send(&[&message(0x7777, &[])], &[], true).unwrap();
        if hostile.send(&[&message(DEVICES, &[])], &[sender.as_fd()], true).is_ok() {
            break;
        }
    }
    drop(sender);
    eventually("one context", || served.bench.agent.status().contexts.len() == 1);
    // By way of the thread that hears the device.
    victim.vm(1).unwrap();
    served.client().vm(1).unwrap();
    let_close(reader);
}

/// As little as what comes with a connection that is refused.
#[test]
fn descriptor_of_a_refused_connection_delays_nobody() {
    let served = Served::limited(AgentOptions::default(), 1);
    let only = served.client();
    let (reader, sender) = lingering();
    let refused = served.raw();
    refused.send(&[&message(DEVICES, &[])], &[sender.as_fd()], true).unwrap();
    drop((sender, refused));
    drop(only);
    // One that is refused meanwhile hears nothing: that thread waits.
    let hello = message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: 0.into() }.as_bytes());
    eventually("a place", || {
        let next = served.raw();
        next.send(&[&hello], &[], true).unwrap();
        let mut answers = [rustix::event::PollFd::new(&next, rustix::event::PollFlags::IN)];
        let soon = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        rustix::event::poll(&mut answers, Some(&soon)).unwrap() == 1
            && next.receive(&mut [0; 256], true).is_ok_and(|answer| answer.len > size_of::<Head>())
    });
    let_close(reader);
}

/// Each limit of memory by its own name.
#[test]
fn limit_of_memory_that_is_reached_is_named() {
    let some = AgentOptions { context_arena_bytes: 1 << 20, ..AgentOptions::default() };
    let one = 4096 + ARENA_OVERHEAD_BYTES;
    let cases = [
        (
            AgentOptions { context_arena_bytes: 4096, ..some.clone() },
            AgentLimit::ProcessMemory,
            "--process-memory",
        ),
        (AgentOptions { user_arena_bytes: one, ..some.clone() }, AgentLimit::UserMemory, "--user-memory"),
        (AgentOptions { total_arena_bytes: one, ..some.clone() }, AgentLimit::TotalMemory, "--total-memory"),
        (AgentOptions { user_arenas: 1, ..some.clone() }, AgentLimit::UserArenas, "of one user"),
        (AgentOptions { total_arenas: 1, ..some.clone() }, AgentLimit::TotalArenas, "all processes"),
        (AgentOptions { context_arenas: 1, ..some.clone() }, AgentLimit::Arenas, "arenas"),
        (AgentOptions { context_parts: 1, ..some }, AgentLimit::Parts, "parts"),
    ];
    for (options, expected, words) in cases {
        let served = Served::new(options);
        let client = served.client();
        let first = client.arena(4096, None).unwrap();
        let (limit, said) = reached(client.arena(4096, None));
        assert_eq!(limit, Some(Reached::Agent(expected)));
        assert!(said.contains("ARENA_CREATE: ENOSPC") && said.contains(words), "{said}");
        drop(first);
    }
}

/// What is wrong with a second one is not what is wrong with a bind.
#[test]
fn second_handle_and_second_mirror_are_told_of_the_first() {
    let served = Served::new(AgentOptions::default());
    let opener = served.client();
    let hello = Hello { version: MESSAGE_VERSION.into(), join: opener.ctx_id().into() };
    let (first, second) = (served.raw(), served.raw());
    assert_eq!(exchange(&first, &message(HELLO, hello.as_bytes())), Some(0));
    assert_eq!(exchange(&second, &message(HELLO, hello.as_bytes())), Some(-16));
    let refused = |what, status| Error::Refused { what, status, detail: 0, limit: None }.to_string();
    let said = refused("HELLO", -16);
    assert!(said.contains("has joined") && said.contains("handle") && !said.contains("window"), "{said}");
    served.bench.mock.script(|script| script.played = true);
    let mirror = opener.mirror(0).unwrap();
    let said = opener.mirror(0).unwrap_err().to_string();
    assert!(said.starts_with("VM_CREATE: EEXIST") && said.contains("use that one"), "{said}");
    assert!(!said.contains("another range"), "{said}");
    mirror.end().unwrap();
    // What they mean elsewhere.
    assert!(
        refused("VM_BIND", -16).contains("mirror window")
            && refused("VM_BIND", -17).contains("another range")
    );
}

/// A connection that says nothing is no way to keep a place from others, nor is one that asks for what it does not get.
#[test]
fn connection_without_a_context_ends() {
    let served = Served::with(AgentOptions::default(), |broker| {
        broker.max_clients_per_uid = 3;
        broker.hello_timeout = Duration::from_millis(200);
    });
    // On a slow machine it may be too late, too.
    let mut client = None;
    eventually("a client", || {
        client = Client::connect(served.socket()).ok();
        client.is_some()
    });
    let (silent, asking) = (served.raw(), served.raw());
    let join = Hello { version: MESSAGE_VERSION.into(), join: 0x00ab_cdef.into() };
    let asked = std::thread::spawn(move || {
        let message = message(HELLO, join.as_bytes());
        let mut buf = [0; 256];
        while asking.send(&[&message], &[], true).is_ok()
            && asking.receive(&mut buf, true).is_ok_and(|received| received.len > 0)
        {}
    });
    let has_ended = || match silent.receive(&mut [0; 256], false) {
        Ok(received) => received.len == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    };
    eventually("the end of the silent one", has_ended);
    eventually("the end of the other one", || asked.is_finished());
    eventually("their places", || Client::connect(served.socket()).is_ok());
    // One that has a context stays.
    assert_eq!(client.unwrap().devices().unwrap().len(), 2);
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
