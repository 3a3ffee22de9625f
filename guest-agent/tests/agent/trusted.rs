//! Memory that a trusted process has pinned itself, with a real io_uring and real pages.

#![expect(unsafe_code, reason = "registers memory with io_uring, as a process would")]

use crate::broker::{Served, exchange, hang_up, message};
use crate::lacking::lacking;
use crate::mock::eventually;
use crate::pinning;
use guest_agent::agent::{AgentOptions, TrustLevel};
use guest_agent::driver::dma::PAGE_BYTES;
use guest_agent::mapping::{Placement, SharedMapping};
use guest_agent::message::*;
use guest_agent::socket::MessageSocket;
use guest_agent::trust::Trust;
use io_uring::IoUring;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

const PAGES: usize = 8;

/// Anonymous memory, all of it touched.
struct Memory(Vec<u8>);

impl Memory {
    fn new() -> Self {
        Self(vec![1; (PAGES + 1) * PAGE_BYTES])
    }

    fn address(&self) -> u64 {
        (self.0.as_ptr() as u64).next_multiple_of(PAGE_BYTES as u64)
    }

    /// An io_uring that has pinned `pages` pages from page `first` on.
    fn pin(&self, first: usize, pages: usize) -> IoUring {
        let ring = IoUring::new(1).unwrap();
        let address = self.address() as usize + first * PAGE_BYTES;
        let base = std::ptr::with_exposed_provenance_mut(address);
        let buffer = libc::iovec { iov_base: base, iov_len: pages * PAGE_BYTES };
        // SAFETY: the memory outlives the ring in each test, and no operation is ever submitted on it.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
        ring
    }

    /// Where its pages are: the kernel's own word, asked for by the test.
    fn frames(&self) -> Vec<u64> {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut bytes = [0; PAGES * 8];
        pagemap.read_exact_at(&mut bytes, self.address() / PAGE_BYTES as u64 * 8).unwrap();
        let entries = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
        entries.map(|entry| (entry & ((1 << 55) - 1)) * PAGE_BYTES as u64).collect()
    }
}

/// Memory and its pin, where the kernel lets this process pin and look up; else says what is not tested.
fn pinned(what: &str) -> Option<(Memory, IoUring)> {
    let memory = Memory::new();
    let why = match pinning::refusal() {
        Some(error) => format!("io_uring: {error}"),
        None if memory.frames().contains(&0) => "the kernel hides page frames: needs root".to_owned(),
        None => {
            let ring = memory.pin(0, PAGES);
            return Some((memory, ring));
        }
    };
    lacking(&format!("{what} ({why})"));
    None
}

fn served_by(uids: Vec<u32>) -> Served {
    let trust = Trust { uids, file: Some("trust.toml".into()) };
    Served::new(AgentOptions { trust, fault_around_pages: 16, ..AgentOptions::default() })
}

fn trusting() -> Served {
    served_by(vec![rustix::process::geteuid().as_raw()])
}

fn greeted(served: &Served) -> MessageSocket {
    let socket = served.raw();
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    assert_eq!(exchange(&socket, &message(HELLO, hello.as_bytes())), Some(0));
    socket
}

fn pin_message(va: u64, pages: usize, ring: i32) -> Vec<u8> {
    let len = (pages * PAGE_BYTES) as u64;
    let body = ArenaPin { va: va.into(), len: len.into(), ring: ring.into(), reserved: 0.into() };
    message(ARENA_PIN, body.as_bytes())
}

fn pages_at(served: &Served, address: u64) -> Option<Vec<u64>> {
    let bench = &served.bench;
    let ctx_id = bench.agent.status().contexts[0].ctx_id;
    let cookie = bench.mock.script(|script| script.fault(ctx_id, address));
    let answer = bench.answered(cookie);
    let pages = |run: &virtio_gpu_svm::protocol::control::PageRun| {
        (0..u64::from(run.pages.get())).map(|n| run.gpa.get() + n * PAGE_BYTES as u64).collect::<Vec<u64>>()
    };
    (answer.code == 0).then(|| answer.runs.iter().flat_map(pages).collect())
}

#[test]
fn memory_that_a_trusted_process_pinned_is_served_until_it_is_freed() {
    let Some((memory, ring)) = pinned("memory that a trusted process pinned is served until it is freed")
    else {
        return;
    };
    let served = trusting();
    let socket = greeted(&served);
    let status = served.bench.agent.status();
    assert_eq!(
        (status.contexts[0].trust, status.trust_file),
        (TrustLevel::Trusted, Some("trust.toml".into()))
    );
    assert_eq!(exchange(&socket, &pin_message(memory.address(), PAGES, ring.as_raw_fd())), Some(0));
    // The process closes its own: the agent has one too.
    drop(ring);
    let frames = memory.frames();
    for page in 0..PAGES {
        let first = memory.address() + (page * PAGE_BYTES) as u64;
        let window = pages_at(&served, first).unwrap();
        assert!(window.contains(&frames[page]) && window.iter().all(|page| frames.contains(page)));
    }
    let cut = ArenaCut { arena_id: 1.into(), offset: 0.into(), len: (PAGE_BYTES as u64).into() };
    assert_eq!(exchange(&socket, &message(ARENA_CUT, cut.as_bytes())), Some(0));
    assert_eq!(pages_at(&served, memory.address()), None);
    assert_eq!(served.bench.memory.rings_held(), 1);
    let free = ArenaFree { arena_id: 1.into() };
    assert_eq!(exchange(&socket, &message(ARENA_FREE, free.as_bytes())), Some(0));
    eventually("let go", || served.bench.memory.rings_held() == 0);
}

/// What the process got wrong is told, pins nothing, and the connection goes on.
#[test]
fn mistakes_of_a_trusted_process_are_told() {
    let Some((memory, ring)) = pinned("mistakes of a trusted process are told") else { return };
    let served = trusting();
    let socket = greeted(&served);
    let (at, fd) = (memory.address(), ring.as_raw_fd());
    let page = PAGE_BYTES as u64;
    let some = memory.pin(2, 3);
    let file = File::open("/proc/self/exe").unwrap();
    for (name, bytes, status) in [
        ("no descriptor", pin_message(at, PAGES, -1), -9),
        ("nor this one", pin_message(at, PAGES, 1_000_000), -9),
        ("a file", pin_message(at, PAGES, file.as_raw_fd()), -22),
        ("unaligned", pin_message(at + 1, PAGES, fd), -22),
        ("nothing", pin_message(at, 0, fd), -22),
        ("more than is registered", pin_message(at - page, PAGES + 1, fd), -14),
        ("beyond what is registered", pin_message(at + page, PAGES, fd), -14),
        ("what another one registered", pin_message(at, PAGES, some.as_raw_fd()), -14),
        ("more than the quota", pin_message(at, 1 << 20, fd), -28),
    ] {
        assert_eq!(exchange(&socket, &bytes), Some(status), "{name}");
    }
    let status = served.bench.agent.status();
    assert_eq!((status.pinned_bytes, served.bench.memory.rings_held()), (0, 0));
    assert_eq!(exchange(&socket, &pin_message(at + 2 * page, 3, some.as_raw_fd())), Some(0));
    assert_eq!(exchange(&socket, &pin_message(at, PAGES, fd)), Some(-17), "overlaps");
    ring.submitter().unregister_buffers().unwrap();
    assert_eq!(exchange(&socket, &pin_message(at, 1, fd)), Some(-14), "no longer registered");
}

/// Shared memory is pinned as well, if the process likes; its pages are looked up in its own pagemap.
#[test]
fn file_that_a_trusted_process_pinned_is_looked_up_in_its_own_mapping() {
    let Some((_, ring)) = pinned("a file that a trusted process pinned is looked up in its own mapping")
    else {
        return;
    };
    let file = crate::mock::file(PAGE_BYTES as u64);
    let mapping = SharedMapping::new(file.as_fd(), 0, PAGE_BYTES, Placement::Anywhere).unwrap();
    mapping.populate(0, PAGE_BYTES).unwrap();
    ring.submitter().unregister_buffers().unwrap();
    let base = std::ptr::with_exposed_provenance_mut(mapping.address());
    let buffer = libc::iovec { iov_base: base, iov_len: PAGE_BYTES };
    // SAFETY: the mapping outlives the ring, and no operation is ever submitted on it.
    unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
    let served = trusting();
    let socket = greeted(&served);
    let address = mapping.address() as u64;
    assert_eq!(exchange(&socket, &pin_message(address, 1, ring.as_raw_fd())), Some(0));
    assert!(pages_at(&served, address).is_some());
    drop(socket);
    eventually("let go", || served.bench.memory.rings_held() == 0);
}

/// Without the operator's word nobody is trusted, whoever else is.
#[test]
fn process_that_is_not_trusted_is_refused() {
    let own = rustix::process::geteuid().as_raw();
    for (name, served) in
        [("nobody is", Served::new(AgentOptions::default())), ("others are", served_by(vec![own + 1]))]
    {
        let socket = greeted(&served);
        assert_eq!(served.bench.agent.status().contexts[0].trust, TrustLevel::Strict);
        let ring = IoUring::new(1).map(|ring| ring.as_raw_fd()).unwrap_or(0);
        assert_eq!(exchange(&socket, &pin_message(0x7000_0000, 1, ring)), Some(-13), "{name}");
        assert_eq!(exchange(&socket, &message(DEVICES, &[])), Some(0), "{name}");
        let mut reserved = pin_message(0x7000_0000, 1, ring);
        *reserved.last_mut().unwrap() = 1;
        assert_eq!(exchange(&socket, &reserved), Some(-22), "{name}");
        assert!(hang_up(&socket), "{name}");
    }
}
