//! Descriptors: where none belong, too many, none where one belongs, and of things that are no memory.

use crate::hostile::{
    ALL_KINDS, CONTEXT_BYTES, EACCES, EINVAL, EOPNOTSUPP, Fate, PAGE, Scene, Session, alone, free, import,
    message,
};
use crate::lacking::lacking;
use crate::mock::file;
use guest_agent::message::{ARENA_IMPORT, ArenaReply};
use guest_agent::socket::MessageSocket;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::FromBytes;

const VA: u64 = 0x5000_0000;
const LEN: u64 = 4 * PAGE;
/// As many as the kernel passes at once.
const MOST_FDS: usize = 253;

/// One message with very many descriptors.
fn send_with(socket: &MessageSocket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

#[test]
fn descriptors_where_none_belong_and_too_many() {
    if !alone("hostile_files::descriptors_where_none_belong_and_too_many") {
        return;
    }
    let scene = Scene::new();
    let memory = file(LEN);
    for kind in ALL_KINDS.into_iter().filter(|kind| *kind != ARENA_IMPORT) {
        for count in [1, 2, MOST_FDS] {
            let session = scene.session();
            send_with(&session.socket, &message(kind, &[0; 16]), &vec![memory.as_fd(); count]);
            let told = session.hear().map(|told| told.status);
            assert_eq!((told, session.hear().is_none()), (Some(EINVAL), true), "kind {kind}, {count}");
        }
        scene.check(&kind);
    }
    for count in [2, 3, 8, 62, 63, 64, MOST_FDS] {
        let session = scene.session();
        send_with(&session.socket, &import(VA, LEN, 0), &vec![memory.as_fd(); count]);
        let told = session.hear().map(|told| told.status);
        assert_eq!((told, session.hear().is_none()), (Some(EINVAL), true), "{count}");
        scene.check(&count);
    }
    assert_eq!(scene.session().fate(&import(VA, LEN, 0), &[], false), Fate::Ended(EINVAL));
    drop(memory);
    scene.end();
}

fn memfd(flags: MemfdFlags, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("hostile", flags | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, LEN).unwrap();
    if !seals.is_empty() {
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    }
    fd
}

fn opened(path: impl AsRef<Path>, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path.as_ref(), flags | OFlags::CLOEXEC, Mode::RWXU).unwrap()
}

/// Things that are no memory, and memory that is not given: name, descriptor, what the agent says.
fn things(scene: &Scene, session: &Session) -> Vec<(&'static str, OwnedFd, i32)> {
    let plain = memfd(MemfdFlags::empty(), SealFlags::empty());
    let again = |flags| opened(format!("/proc/self/fd/{}", plain.as_raw_fd()), flags);
    let (reader, writer) = io::pipe().unwrap();
    let (unix, _) = MessageSocket::pair().unwrap();
    let fifo = scene.directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let me = rustix::process::getpid();
    let pidfd = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).unwrap();
    let mut things = vec![
        ("read end of a pipe", reader.into(), EACCES),
        ("write end of a pipe", writer.into(), EACCES),
        ("both ends of a pipe", opened(fifo, OFlags::RDWR), EOPNOTSUPP),
        ("a socket", unix.into_fd(), EOPNOTSUPP),
        ("its own connection", session.socket.as_fd().try_clone_to_owned().unwrap(), EOPNOTSUPP),
        ("a folder", opened("/dev/shm", OFlags::DIRECTORY), EACCES),
        ("/dev/zero", opened("/dev/zero", OFlags::RDWR), EOPNOTSUPP),
        ("/dev/null", opened("/dev/null", OFlags::RDWR), EOPNOTSUPP),
        ("an eventfd", event, EOPNOTSUPP),
        ("a pidfd", pidfd, EOPNOTSUPP),
        ("/proc/self/mem", opened("/proc/self/mem", OFlags::RDWR), EOPNOTSUPP),
        ("a memfd to read", again(OFlags::RDONLY), EACCES),
        ("a memfd to write", again(OFlags::WRONLY), EACCES),
        ("a memfd by name alone", again(OFlags::PATH), EACCES),
        ("a memfd to append to", again(OFlags::RDWR | OFlags::APPEND), 0),
        ("a memfd that cannot shrink", memfd(MemfdFlags::ALLOW_SEALING, SealFlags::SHRINK), 0),
        ("unnamed on tmpfs", opened_unnamed("/dev/shm"), 0),
    ];
    let short = memfd(MemfdFlags::empty(), SealFlags::empty());
    rustix::fs::ftruncate(&short, LEN - PAGE).unwrap();
    things.push(("a memfd of a page too few", short, EINVAL));
    if scene.memory.is_real() {
        let sealed = |seal| memfd(MemfdFlags::ALLOW_SEALING, seal);
        things.push(("a memfd that nobody writes", sealed(SealFlags::WRITE), -1));
        things.push(("a memfd that nobody writes from now on", sealed(SealFlags::FUTURE_WRITE), -1));
    }
    let build = std::env::current_exe().unwrap();
    let disk = opened_unnamed(build.parent().unwrap());
    if rustix::fs::fstatfs(&disk).unwrap().f_type == rustix::fs::fstatfs(&plain).unwrap().f_type {
        lacking("a file on a disk (the build is on tmpfs: choose another CARGO_TARGET_DIR)");
    } else {
        things.push(("a file on a disk", disk, EOPNOTSUPP));
    }
    things
}

/// A file that has no name, of [`LEN`] bytes.
fn opened_unnamed(folder: impl AsRef<Path>) -> OwnedFd {
    let fd = opened(folder, OFlags::RDWR | OFlags::TMPFILE);
    rustix::fs::ftruncate(&fd, LEN).unwrap();
    fd
}

#[test]
fn descriptors_of_other_things() {
    if !alone("hostile_files::descriptors_of_other_things") {
        return;
    }
    let scene = Scene::new();
    let session = scene.session();
    for (name, fd, wanted) in things(&scene, &session) {
        assert_eq!(session.fate(&import(VA, LEN, 0), &[fd.as_fd()], true), Fate::Told(wanted), "{name}");
        if wanted == 0 {
            // A lock on it is between those who ask for locks.
            rustix::fs::flock(&fd, rustix::fs::FlockOperation::LockExclusive).unwrap();
            let again = session.ask(&import(VA + LEN, LEN, 0), &[fd.as_fd()]).unwrap();
            assert_eq!(again.status, 0, "{name}, locked");
            let id = ArenaReply::read_from_bytes(&again.body).unwrap().arena_id.get();
            assert_eq!(session.status(&free(id), &[]), Some(0), "{name}");
            assert_eq!(session.status(&free(id - 1), &[]), Some(0), "{name}");
        }
        scene.check(&name);
    }
    drop(session);
    scene.end();
}

/// The file is cut short, punched and made longer again while it is brought over and over: each time the agent has all of
/// its pages, or none and says so.
#[test]
fn file_that_changes_while_it_is_brought() {
    if !alone("hostile_files::file_that_changes_while_it_is_brought") {
        return;
    }
    let scene = Scene::new();
    let memory = file(64 * PAGE);
    let over = AtomicBool::new(false);
    let (mut brought, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                rustix::fs::ftruncate(&memory, 32 * PAGE).unwrap();
                rustix::fs::ftruncate(&memory, 64 * PAGE).unwrap();
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&memory, hole, PAGE, 8 * PAGE).unwrap();
            }
        });
        let session = scene.session();
        for round in 0..300 {
            let told = session.ask(&import(VA, 64 * PAGE, 0), &[memory.as_fd()]).unwrap();
            match told.status {
                0 => {
                    brought += 1;
                    let id = ArenaReply::read_from_bytes(&told.body).unwrap().arena_id.get();
                    assert_eq!(scene.memory.pages(id).len(), 64);
                    assert_eq!(session.status(&free(id), &[]), Some(0));
                }
                // Too short by now, gone under the agent's hands, or gone each time it looked.
                EINVAL | -14 | -11 => refused += 1,
                other => panic!("round {round}: {other}"),
            }
            if round % 50 == 0 {
                scene.check(&round);
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("brought {brought} times, refused {refused} times");
    assert!(CONTEXT_BYTES >= 64 * PAGE && brought + refused == 300);
    drop(memory);
    scene.end();
}
