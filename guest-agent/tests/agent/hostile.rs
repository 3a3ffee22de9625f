//! Processes that mean no good, at a real broker whose memory is really pinned where the test may: every kind of message
//! with every length, and every number that may be wrong. After each a process that behaves gets memory, a binding and
//! the answer to a fault, a victim's bytes are as they were, and at the end nothing is left.
//!
//! * `hostile_files`: descriptors.
//! * `hostile_lives`: processes that die, join, inherit, do not read, or take all that there is.
//! * `hostile_walk`: all of it in random order.

use crate::lacking::lacking;
use crate::mock::{Mock, device, eventually, file};
use crate::pinning;
use guest_agent::agent::{Agent, AgentOptions, ArenaMemory, ArenaPages, ImportedPages};
use guest_agent::broker::{Broker, BrokerOptions};
use guest_agent::memory_file::MemoryFile;
use guest_agent::message::*;
use guest_agent::pin::{self, Held, Hold, KernelPinner, Pinned, Pinner};
use guest_agent::socket::MessageSocket;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use virtio_gpu_svm::protocol::request::{BIND_OP_MAP_USERPTR, BindOp, ReqHdr, SVM_REQ_VM_BIND, VmBind};
use virtio_gpu_svm::protocol::{GUEST_VA_END, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

pub const PAGE: u64 = PAGE_SIZE;
/// A: where the victim has its memory, and each witness its own.
pub const VICTIM_VA: u64 = 0x7000_0000;
const WITNESS_VA: u64 = 0x6000_0000;
const VICTIM_PAGES: u64 = 4;
/// Limits of a scene.
pub const CONTEXT_BYTES: u64 = 4 << 20;
pub const TOTAL_BYTES: u64 = 12 << 20;
pub const ARENAS: usize = 16;
pub const PARTS: usize = 24;
pub const CLIENTS: usize = 24;
/// Says to a test's program that it is the process that [`alone`] has started.
const ALONE: &str = "SVM_TEST_ALONE";
/// Longer than anything takes, so that a test that would wait for ever fails.
const PATIENCE: Duration = Duration::from_secs(30);

pub const EINVAL: i32 = -22;
pub const ENOENT: i32 = -2;
pub const ENOSPC: i32 = -28;
pub const EACCES: i32 = -13;
pub const EOPNOTSUPP: i32 = -95;

/// Runs the test of this name again in a process of its own, whose descriptors can be counted. True: this is it.
pub fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = this_test(test).env(ALONE, "1").output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    println!("{stdout}");
    // Past what holds back the output of tests that pass: it says what was not tested.
    io::stderr().write_all(&output.stderr).unwrap();
    assert!(output.status.success() && stdout.contains("1 passed"), "{test}: {}", output.status);
    false
}

/// This program, about to run this test and no other one.
pub fn this_test(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--include-ignored", "--nocapture", "--test-threads=1"]);
    command
}

/// Memory as the keeper makes it: by the kernel's pins, or, without root, in name only.
pub struct Memory {
    pinner: Option<KernelPinner>,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    last: u64,
    live: HashMap<u64, (Vec<u64>, Option<Hold>)>,
    /// Released though it was not there: twice, or never made.
    wrong: Vec<u64>,
}

impl Memory {
    fn new() -> Self {
        // Fails without CAP_SYS_RESOURCE; then the next line says what is missing.
        KernelPinner::raise_limit().ok();
        let refused = pinning::refusal().map(|error| format!("io_uring: {error}"));
        let refused = refused.or_else(|| KernelPinner.pin(4096).err().map(|error| error.to_string()));
        let pinner = if refused.is_none() { Some(KernelPinner) } else { None };
        if let Some(why) = refused {
            lacking(&format!("hostile processes and real pins ({why})"));
        }
        Self { pinner, made: Mutex::default() }
    }

    /// Whether the kernel pins it.
    pub fn is_real(&self) -> bool {
        self.pinner.is_some()
    }

    /// Arenas that are held.
    pub fn len(&self) -> usize {
        self.made.lock().unwrap().live.len()
    }

    /// Where an arena's pages are.
    pub fn pages(&self, id: u64) -> Vec<u64> {
        self.made.lock().unwrap().live[&id].0.clone()
    }

    fn add(&self, pages: Option<Vec<u64>>, hold: Option<Hold>, len: u64) -> (u64, Vec<u64>) {
        let mut made = self.made.lock().unwrap();
        made.last += 1;
        let id = made.last;
        let pages = pages.unwrap_or_else(|| (0..len / PAGE).map(|page| (id << 32) + page * PAGE).collect());
        made.live.insert(id, (pages.clone(), hold));
        (id, pages)
    }
}

fn in_words(error: &guest_agent::pin::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno().raw_os_error())
}

impl ArenaMemory for Memory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let Some(pinner) = &self.pinner else {
            let (id, pages) = self.add(None, None, len);
            return Ok(ArenaPages { id, fd: file(len), offset: 0, pages });
        };
        let pinned = pinner.pin(usize::try_from(len).unwrap()).map_err(|error| in_words(&error))?;
        let Pinned { fd, pages, hold } = pinned;
        let (id, pages) = self.add(Some(pages), Some(hold), len);
        Ok(ArenaPages { id, fd, offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let held = self.pinner.as_ref().map(|pinner| {
            let len = usize::try_from(file.len()).unwrap();
            let held = pinner.import(file.as_fd(), file.offset(), len).and_then(pin::finish);
            held.map_err(|error| in_words(&error))
        });
        let (pages, hold) = match held.transpose()? {
            Some(Held { pages, hold }) => (Some(pages), Some(hold)),
            None => (None, None),
        };
        let (id, pages) = self.add(pages, hold, file.len());
        Ok(ImportedPages { id, pages })
    }

    fn release(&self, id: u64) {
        let mut made = self.made.lock().unwrap();
        if made.live.remove(&id).is_none() {
            made.wrong.push(id);
        }
    }
}

/// Kinds that there are, and some that there are not.
pub const ALL_KINDS: [u32; 12] = [
    0,
    HELLO,
    DEVICES,
    ARENA_CREATE,
    ARENA_FREE,
    SUBMIT,
    ARENA_IMPORT,
    ARENA_CUT,
    ARENA_PIN + 1,
    EVENTS,
    EVENTS + 1,
    u32::MAX,
];

/// A message to the agent.
pub fn message(kind: u32, body: &[u8]) -> Vec<u8> {
    let head = Head { kind: kind.into(), seqno: 5.into(), status: 0.into(), reserved: 0.into() };
    [head.as_bytes(), body].concat()
}

pub fn hello(join: u32) -> Vec<u8> {
    message(HELLO, Hello { version: MESSAGE_VERSION.into(), join: join.into() }.as_bytes())
}

pub fn create(va: u64, len: u64) -> Vec<u8> {
    message(ARENA_CREATE, ArenaCreate { len: len.into(), va: va.into() }.as_bytes())
}

pub fn import(va: u64, len: u64, offset: u64) -> Vec<u8> {
    let body = ArenaImport { len: len.into(), va: va.into(), offset: offset.into() };
    message(ARENA_IMPORT, body.as_bytes())
}

pub fn free(arena_id: u64) -> Vec<u8> {
    message(ARENA_FREE, ArenaFree { arena_id: arena_id.into() }.as_bytes())
}

pub fn cut(arena_id: u64, offset: u64, len: u64) -> Vec<u8> {
    let body = ArenaCut { arena_id: arena_id.into(), offset: offset.into(), len: len.into() };
    message(ARENA_CUT, body.as_bytes())
}

pub fn submit(reply_len: u32, reserved: u32, payload: &[u8]) -> Vec<u8> {
    let submit = Submit { reply_len: reply_len.into(), reserved: reserved.into() };
    message(SUBMIT, &[submit.as_bytes(), payload].concat())
}

/// Shows a page to a GPU.
pub fn bind(va: u64) -> Vec<u8> {
    let op = BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: 0x10_0000.into(),
        range: PAGE.into(),
        obj_offset: va.into(),
        ..BindOp::default()
    };
    let len = u32::try_from(size_of::<VmBind>() + size_of::<BindOp>()).unwrap();
    let hdr = ReqHdr { cmd: SVM_REQ_VM_BIND.into(), len: len.into(), ..ReqHdr::default() };
    let bind = VmBind { hdr, vm_id: 1.into(), num_binds: 1.into(), ..VmBind::default() };
    submit(64, 0, &[bind.as_bytes(), op.as_bytes()].concat())
}

/// A reply.
pub struct Told {
    pub status: i32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// One process' way to the agent; speaks what it likes.
pub struct Session {
    pub socket: MessageSocket,
    pub ctx_id: u32,
}

impl Session {
    /// Says nothing yet.
    pub fn silent(path: &Path) -> Self {
        let socket = MessageSocket::connect(path).unwrap();
        socket.pass_credentials().unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).unwrap();
        Self { socket, ctx_id: 0 }
    }

    /// Has a context.
    pub fn open(path: &Path) -> Self {
        let mut session = Self::silent(path);
        let told = session.ask(&hello(0), &[]).unwrap();
        assert_eq!(told.status, 0, "HELLO");
        session.ctx_id = HelloReply::read_from_bytes(&told.body).unwrap().ctx_id.get();
        session
    }

    /// The next reply, records left out. `None`: the agent has hung up.
    pub fn hear(&self) -> Option<Told> {
        let mut buf = vec![0; MAX_MESSAGE_BYTES];
        loop {
            let received = match self.socket.receive(&mut buf, true) {
                Ok(received) if received.len == 0 => return None,
                Ok(received) => received,
                Err(error) => {
                    assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "the agent says nothing");
                    return None;
                }
            };
            let (head, body) = Head::read_from_prefix(&buf[..received.len]).unwrap();
            if head.kind.get() != EVENTS || head.status.get() != 0 {
                return Some(Told { status: head.status.get(), body: body.to_vec(), fds: received.fds });
            }
        }
    }

    /// A request and its reply; `None`: hung up without a word.
    pub fn ask(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Option<Told> {
        // What is hung up already is seen by who listens.
        self.socket.send(&[bytes], fds, true).ok();
        self.hear()
    }

    pub fn status(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Option<i32> {
        self.ask(bytes, fds).map(|told| told.status)
    }

    /// An arena and its file.
    pub fn arena(&self, va: u64, len: u64) -> (u64, File) {
        let mut told = self.ask(&create(va, len), &[]).unwrap();
        assert_eq!(told.status, 0, "{va:#x}+{len:#x}");
        let id = ArenaReply::read_from_bytes(&told.body).unwrap().arena_id.get();
        (id, File::from(told.fds.pop().unwrap()))
    }

    /// What becomes of a process that sends this.
    pub fn fate(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], goes_on: bool) -> Fate {
        match self.ask(bytes, fds) {
            None => Fate::Dropped,
            Some(told) if goes_on && self.status(&message(DEVICES, &[]), &[]) == Some(0) => {
                Fate::Told(told.status)
            }
            Some(told) if goes_on || self.hear().is_none() => Fate::Ended(told.status),
            Some(told) => Fate::Told(told.status),
        }
    }
}

/// What becomes of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It hears this, and goes on.
    Told(i32),
    /// It hears this, and is hung up on.
    Ended(i32),
    /// It is hung up on without a word.
    Dropped,
}

/// An agent on a mock device, its broker, and a process whose memory is of interest to others.
pub struct Scene {
    pub mock: Arc<Mock>,
    pub agent: Arc<Agent>,
    pub memory: Arc<Memory>,
    broker: Option<Broker>,
    pub directory: tempfile::TempDir,
    victim: Option<Victim>,
    descriptors: usize,
}

struct Victim {
    session: Session,
    file: File,
    pages: Vec<u64>,
}

/// The word of the victim's memory at this offset.
fn secret(offset: u64) -> u64 {
    0x5ec2_e700_0000_0000 ^ offset
}

impl Scene {
    pub fn new() -> Self {
        Self::with_user_limit(TOTAL_BYTES)
    }

    /// Where the memory of one user's contexts is limited, too.
    pub fn with_user_limit(user_arena_bytes: u64) -> Self {
        let descriptors = descriptors();
        let (mock, device) = device();
        let memory = Arc::new(Memory::new());
        let options = AgentOptions {
            context_arena_bytes: CONTEXT_BYTES,
            total_arena_bytes: TOTAL_BYTES,
            user_arena_bytes,
            context_arenas: ARENAS,
            context_parts: PARTS,
            ..AgentOptions::default()
        };
        let agent = Agent::start(device, memory.clone(), options).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut listen = BrokerOptions::at(directory.path().join("agent.sock"));
        listen.max_clients_per_uid = CLIENTS;
        let broker = Some(Broker::start(agent.clone(), listen).unwrap());
        let mut scene = Self { mock, agent, memory, broker, directory, victim: None, descriptors };
        let session = scene.session();
        let (id, file) = session.arena(VICTIM_VA, VICTIM_PAGES * PAGE);
        for offset in (0..VICTIM_PAGES * PAGE).step_by(8) {
            file.write_all_at(&secret(offset).to_le_bytes(), offset).unwrap();
        }
        scene.victim = Some(Victim { session, file, pages: scene.memory.pages(id) });
        scene
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub fn session(&self) -> Session {
        Session::open(&self.socket())
    }

    pub fn victim(&self) -> u32 {
        self.victim.as_ref().unwrap().session.ctx_id
    }

    pub fn victim_arena(&self) -> u64 {
        1
    }

    /// A process that behaves is served as ever, and the victim has what it had.
    pub fn check(&self, after: &dyn std::fmt::Debug) {
        let witness = self.session();
        let (id, _file) = witness.arena(WITNESS_VA, 4 * PAGE);
        assert_eq!(witness.status(&bind(WITNESS_VA), &[]), Some(0), "after {after:?}");
        self.expect_fault(witness.ctx_id, WITNESS_VA + PAGE, &self.memory.pages(id), after);
        self.check_victim(after);
    }

    pub fn check_victim(&self, after: &dyn std::fmt::Debug) {
        let Victim { session, file, pages } = self.victim.as_ref().unwrap();
        self.expect_fault(session.ctx_id, VICTIM_VA, pages, after);
        let mut found = vec![0; usize::try_from(VICTIM_PAGES * PAGE).unwrap()];
        file.read_exact_at(&mut found, 0).unwrap();
        let words = found.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        assert!((0..).step_by(8).map(secret).zip(words).all(|(a, b)| a == b), "bytes after {after:?}");
    }

    /// A fault there is answered, with pages of these.
    fn expect_fault(&self, ctx_id: u32, va: u64, pages: &[u64], after: &dyn std::fmt::Debug) {
        let cookie = self.mock.script(|script| script.fault(ctx_id, va));
        let find = || {
            let script = self.mock.look();
            let found = script.answers.iter().rev().find(|a| a.cookie == cookie && a.status == 0);
            found.map(|answer| (answer.code, pages_of(&answer.runs)))
        };
        eventually(&format!("an answer after {after:?}"), || find().is_some());
        let (code, told) = find().unwrap();
        let own = !told.is_empty() && told.iter().all(|page| pages.contains(page));
        assert!(code == 0 && own, "after {after:?}: {code}, {told:x?} of {pages:x?}");
    }

    /// No answer to anybody else has named a page of the victim.
    pub fn check_answers(&self) {
        let pages = &self.victim.as_ref().unwrap().pages;
        for answer in &self.mock.look().answers {
            let secret = pages_of(&answer.runs).iter().any(|page| pages.contains(page));
            assert!(!secret || answer.ctx_id == self.victim(), "{answer:x?}");
        }
    }

    /// Waits until the victim is the only one.
    pub fn only_victim_is_left(&self) {
        let ids = || -> Vec<u32> { self.agent.status().contexts.iter().map(|c| c.ctx_id).collect() };
        eventually("only the victim is left", || ids() == [self.victim()]);
        let bytes = || self.agent.status().pinned_bytes;
        eventually("no other memory counts", || bytes() == VICTIM_PAGES * PAGE);
        eventually("its memory alone is held", || self.memory.len() == 1);
    }

    /// Nothing is left of anybody, and every descriptor is closed.
    pub fn end(mut self) {
        self.check(&"all");
        self.check_answers();
        self.only_victim_is_left();
        self.victim = None;
        eventually("nobody is left", || self.agent.status().contexts.is_empty());
        eventually("nothing counts", || self.agent.status().pinned_bytes == 0);
        assert_eq!(self.memory.len(), 0, "nothing is held");
        assert_eq!(self.memory.made.lock().unwrap().wrong, [0u64; 0], "released and not there");
        self.broker = None;
        self.agent.stop();
        self.mock.end();
        let Self { mock, agent, memory, directory, descriptors: before, .. } = self;
        drop((mock, agent, memory, directory));
        eventually(&format!("{before} descriptors, of {}", descriptors()), || descriptors() == before);
    }
}

fn pages_of(runs: &[virtio_gpu_svm::protocol::control::PageRun]) -> Vec<u64> {
    let pages = |run: &virtio_gpu_svm::protocol::control::PageRun| {
        let first = run.gpa.get();
        (0..u64::from(run.pages.get())).map(move |page| first + page * PAGE)
    };
    runs.iter().flat_map(pages).collect()
}

/// How many this process has.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What a message of zeros with this length leads to.
fn fate_of_zeros(kind: u32, len: usize, greeted: bool) -> Fate {
    let head = size_of::<Head>();
    match (kind, len.checked_sub(head)) {
        (_, None) if len == 0 => Fate::Dropped,
        (HELLO, Some(body)) if body == size_of::<Hello>() && !greeted => Fate::Ended(EOPNOTSUPP),
        (DEVICES, Some(0)) if greeted => Fate::Told(0),
        (ARENA_CREATE, Some(body)) if body == size_of::<ArenaCreate>() && greeted => Fate::Told(EINVAL),
        (ARENA_FREE, Some(body)) if body == size_of::<ArenaFree>() && greeted => Fate::Told(ENOENT),
        (ARENA_CUT, Some(body)) if body == size_of::<ArenaCut>() && greeted => Fate::Told(ENOENT),
        // Nobody is trusted.
        (ARENA_PIN, Some(body)) if body == size_of::<ArenaPin>() && greeted => Fate::Told(EACCES),
        (SUBMIT, Some(body)) if body > size_of::<Submit>() && greeted => Fate::Told(0),
        _ => Fate::Ended(EINVAL),
    }
}

/// Every kind there is and some that there are not, with every length up to one more than any of them has.
#[test]
fn every_kind_with_every_length() {
    if !alone("hostile::every_kind_with_every_length") {
        return;
    }
    let scene = Scene::new();
    let longest = size_of::<Head>() + size_of::<ArenaCut>() + 1;
    for kind in ALL_KINDS {
        for (greeted, len) in (0..=longest).flat_map(|len| [(false, len), (true, len)]) {
            let case = format!("kind {kind:#x}, {len} bytes, after HELLO: {greeted}");
            let session = if greeted { scene.session() } else { Session::silent(&scene.socket()) };
            let mut bytes = message(kind, &[0; 32]);
            bytes.truncate(len);
            let wanted = fate_of_zeros(kind, len, greeted);
            let goes_on = matches!(wanted, Fate::Told(_));
            assert_eq!(session.fate(&bytes, &[], goes_on), wanted, "{case}");
            if len % 4 == 0 {
                scene.check(&case);
            }
        }
    }
    scene.end();
}

/// A message that does not fit is cut by the kernel; a head may be wrong in each of its fields.
#[test]
fn heads_that_lie_and_messages_too_large() {
    if !alone("hostile::heads_that_lie_and_messages_too_large") {
        return;
    }
    let scene = Scene::new();
    let mut rows = vec![];
    for len in [MAX_MESSAGE_BYTES + 2, MAX_MESSAGE_BYTES + 1000] {
        rows.push((format!("{len} bytes"), submit(16, 0, &vec![0xff; len - 24]), Fate::Ended(EINVAL)));
    }
    let fits = submit(16, 0, &vec![0xff; MAX_MESSAGE_BYTES - 24]);
    for at in 8..16 {
        for bit in 0..8 {
            let mut bytes = message(DEVICES, &[]);
            bytes[at] |= 1 << bit;
            rows.push((format!("bit {bit} of byte {at}"), bytes, Fate::Ended(EINVAL)));
        }
    }
    for reply_len in [MAX_REPLY_BYTES + 1, 1 << 31, u32::MAX] {
        let name = format!("a reply of {reply_len}");
        rows.push((name, submit(reply_len, 0, &[0xff; 16]), Fate::Ended(EINVAL)));
    }
    for bit in 0..32 {
        rows.push((format!("reserved {bit}"), submit(16, 1 << bit, &[0xff; 16]), Fate::Ended(EINVAL)));
    }
    rows.push(("HELLO again".into(), hello(0), Fate::Ended(EINVAL)));
    rows.push(("HELLO that joins itself".into(), hello(3), Fate::Ended(EINVAL)));
    for (name, bytes, wanted) in &rows {
        let session = scene.session();
        assert_eq!(session.fate(bytes, &[], false), *wanted, "{name}");
        scene.check(name);
    }
    // What just fits is the device's to refuse, or the driver's.
    let session = scene.session();
    assert!(matches!(session.fate(&fits, &[], true), Fate::Told(_)));
    drop(session);
    for version in [0, 2, u32::MAX] {
        let bytes = message(HELLO, Hello { version: version.into(), join: 0.into() }.as_bytes());
        assert_eq!(Session::silent(&scene.socket()).fate(&bytes, &[], false), Fate::Ended(EOPNOTSUPP));
    }
    scene.end();
}

#[test]
fn message_of_one_byte_too_many_is_refused() {
    let scene = Scene::new();
    let bytes = submit(16, 0, &vec![0xff; MAX_MESSAGE_BYTES + 1 - 24]);
    assert_eq!(bytes.len(), MAX_MESSAGE_BYTES + 1);
    assert_eq!(scene.session().status(&bytes, &[]), Some(EINVAL));
}

/// Numbers around everything that a check may be about.
pub const NUMBERS: [u64; 20] = [
    0,
    1,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    4 * PAGE,
    8 * PAGE,
    VICTIM_VA,
    CONTEXT_BYTES + PAGE,
    1 << 32,
    (1 << 47) - PAGE,
    1 << 47,
    0xffff_8000_0000_0000 - PAGE,
    0xffff_8000_0000_0000,
    GUEST_VA_END - PAGE,
    GUEST_VA_END,
    1 << 63,
    u64::MAX - 2 * PAGE + 1,
    u64::MAX - PAGE + 1,
    u64::MAX,
];

/// What the agent says of an arena of nobody's else.
fn status_of_range(va: u64, len: u64) -> i32 {
    let aligned = va.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
    let inside = u128::from(va) + u128::from(len) <= u128::from(GUEST_VA_END);
    match (aligned && inside && va > 0 && len > 0, len > CONTEXT_BYTES) {
        (false, _) => EINVAL,
        (true, true) => ENOSPC,
        (true, false) => 0,
    }
}

#[test]
fn arenas_at_every_address_with_every_length() {
    if !alone("hostile::arenas_at_every_address_with_every_length") {
        return;
    }
    let scene = Scene::new();
    let session = scene.session();
    let memory = file(8 * PAGE);
    for va in NUMBERS {
        for len in NUMBERS {
            let told = session.ask(&create(va, len), &[]).unwrap();
            assert_eq!(told.status, status_of_range(va, len), "made at {va:#x}+{len:#x}");
            give_back(&session, &told);
            for offset in NUMBERS {
                let case = format!("brought at {va:#x}+{len:#x} from {offset:#x}");
                let in_file = offset.is_multiple_of(PAGE)
                    && len.is_multiple_of(PAGE)
                    && len > 0
                    && u128::from(offset) + u128::from(len) <= 8 * u128::from(PAGE);
                let wanted = if in_file { status_of_range(va, len) } else { EINVAL };
                let told = session.ask(&import(va, len, offset), &[memory.as_fd()]).unwrap();
                assert_eq!(told.status, wanted, "{case}");
                assert!(told.fds.is_empty(), "{case}");
                give_back(&session, &told);
            }
        }
        scene.check(&va);
    }
    drop((session, memory));
    scene.end();
}

/// An arena that was had, and is not again.
fn give_back(session: &Session, told: &Told) {
    if told.status == 0 {
        let id = ArenaReply::read_from_bytes(&told.body).unwrap().arena_id.get();
        assert_eq!(session.status(&free(id), &[]), Some(0));
        assert_eq!(session.status(&free(id), &[]), Some(ENOENT), "given back twice");
        assert_eq!(session.status(&cut(id, 0, PAGE), &[]), Some(ENOENT), "cut though it is gone");
    }
}

/// Whatever number names an arena: another process' does not exist, and of one's own only what is there can be cut.
#[test]
fn arenas_of_others_and_cuts_beyond_the_own() {
    if !alone("hostile::arenas_of_others_and_cuts_beyond_the_own") {
        return;
    }
    let scene = Scene::new();
    let (session, other) = (scene.session(), scene.session());
    let theirs = other.arena(WITNESS_VA, 8 * PAGE).0;
    for id in NUMBERS.into_iter().chain([scene.victim_arena(), theirs, theirs + 1]) {
        assert_eq!(session.status(&free(id), &[]), Some(ENOENT), "{id}");
        for (offset, len) in NUMBERS.into_iter().flat_map(|offset| NUMBERS.map(|len| (offset, len))) {
            let aligned = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            let wanted = if aligned { ENOENT } else { EINVAL };
            assert_eq!(session.status(&cut(id, offset, len), &[]), Some(wanted), "{id} {offset:#x}+{len:#x}");
        }
    }
    scene.check(&"arenas of others");
    // Beside and over the victim's addresses: they are the process' own, and mean the process' own memory.
    let mine = session.arena(VICTIM_VA, 8 * PAGE).0;
    for (va, len) in [(VICTIM_VA, PAGE), (VICTIM_VA - PAGE, 2 * PAGE), (VICTIM_VA + 7 * PAGE, 9 * PAGE)] {
        assert_eq!(session.status(&create(va, len), &[]), Some(-17), "{va:#x}+{len:#x} overlaps");
    }
    let mut there = [true; 8];
    for (offset, len) in NUMBERS.into_iter().flat_map(|offset| NUMBERS.map(|len| (offset, len))) {
        let end = u128::from(offset) + u128::from(len);
        let fits =
            offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0 && end <= 8 * u128::from(PAGE);
        let pages = || (offset / PAGE) as usize..((offset + len) / PAGE) as usize;
        let wanted = match fits {
            // All of it is gone, and its name with it.
            _ if there == [false; 8] && offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) => ENOENT,
            false => EINVAL,
            true if there[pages()].iter().all(|there| *there) => 0,
            true => ENOENT,
        };
        assert_eq!(session.status(&cut(mine, offset, len), &[]), Some(wanted), "{offset:#x}+{len:#x}");
        if wanted == 0 {
            there[pages()].fill(false);
        }
    }
    scene.check(&"cuts");
    drop((session, other));
    scene.end();
}
