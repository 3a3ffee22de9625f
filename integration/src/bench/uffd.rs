//! The reference of device faults: a CPU's own fault, told to user space by userfaultfd and answered with pages that are
//! there already (UFFDIO_CONTINUE of shared memory: nothing is copied, as nothing is for a device).

#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use super::place::pin;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{Advice, UserfaultfdFlags, madvise, userfaultfd};
use rustix::thread::CpuSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

/// `UFFD_USER_MODE_ONLY`: for that no privilege is needed.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_MINOR_SHMEM`.
const MINOR_SHMEM: u64 = 1 << 10;
/// `UFFDIO_REGISTER_MODE_MINOR`.
const MINOR: u64 = 1 << 2;
/// `struct uffd_msg`, and where a page fault's address stands in it.
const EVENT: usize = 32;
const ADDRESS: usize = 16;

/// `struct uffdio_api`: api, features, ioctls.
type ApiCall = [u64; 3];
/// `struct uffdio_register`: start, length, mode, ioctls.
type RegisterCall = [u64; 4];
/// `struct uffdio_continue`: start, length, mode, bytes mapped.
type ContinueCall = [u64; 4];

const HANDSHAKE: u32 = opcode::read_write::<ApiCall>(0xaa, 0x3f);
const REGISTER: u32 = opcode::read_write::<RegisterCall>(0xaa, 0x00);
const CONTINUE: u32 = opcode::read_write::<ContinueCall>(0xaa, 0x07);

/// Shared memory whose pages are there but not mapped, and a thread that touches them.
pub struct Faults {
    fd: OwnedFd,
    memory: Arc<MmapRegion<()>>,
    /// Says where the next touches go; the thread ends with it.
    touch: Option<Sender<u64>>,
    touched: Receiver<Duration>,
    thread: Option<JoinHandle<()>>,
    /// Pages that one answer maps.
    pages: u64,
    polls: bool,
}

impl Faults {
    /// `places` places of so many pages each, touched from one core. Who answers looks for faults, or sleeps.
    ///
    /// # Errors
    /// The kernel has no userfaultfd, or none for whoever runs this.
    pub fn new(core: CpuSet, places: u64, pages: u64, polls: bool) -> Result<Self> {
        let bytes = places * pages * PAGE_SIZE;
        let file = File::from(rustix::fs::memfd_create("faults", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes)?;
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(bytes)?)?;
        let memory: Arc<MmapRegion<()>> = Arc::new(memory);
        for page in 0..places * pages {
            let word: &AtomicU64 = memory.get_atomic_ref(usize::try_from(page * PAGE_SIZE)?)?;
            word.store(1, Ordering::Relaxed);
        }
        let fd = register(memory.as_ptr() as u64, bytes).context("userfaultfd")?;
        let (touch, commands) = channel();
        let (done, touched) = channel();
        let theirs = Arc::clone(&memory);
        let thread = std::thread::spawn(move || {
            // Where the core cannot be had nothing is touched, and the other side finds out.
            if pin(core).is_ok() {
                while let Some(elapsed) = commands.recv().ok().and_then(|n| touch_all(&theirs, n, pages)) {
                    if done.send(elapsed).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Self { fd, memory, touch: Some(touch), touched, thread: Some(thread), pages, polls })
    }

    /// Microseconds of each of `places` faults, one after the other.
    ///
    /// # Errors
    /// A fault does not come, or cannot be answered.
    pub fn round(&mut self, places: u64) -> Result<f64> {
        self.forget()?;
        self.touch.as_ref().context("it has ended")?.send(places)?;
        for _ in 0..places {
            let address = self.next_fault()?;
            self.answer(address)?;
        }
        let elapsed = self.touched.recv().context("the thread that touches pages has ended")?;
        Ok(elapsed.as_secs_f64() * 1e6 / places as f64)
    }

    /// Takes the translations away again; the pages stay in the file.
    fn forget(&self) -> Result<()> {
        // SAFETY: the range is one mapping of ours, shared with its file, so that no contents are lost; references into
        // it are to atomics, which read the same afterwards.
        unsafe { madvise(self.memory.as_ptr().cast(), self.memory.size(), Advice::LinuxDontNeed) }?;
        Ok(())
    }

    fn next_fault(&self) -> Result<u64> {
        let mut event = [0; EVENT];
        loop {
            match rustix::io::read(&self.fd, &mut event) {
                Ok(EVENT) => break,
                Ok(bytes) => bail!("an event of {bytes} bytes"),
                Err(Errno::AGAIN) if self.polls => std::hint::spin_loop(),
                Err(Errno::AGAIN) => {
                    poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], None)?;
                }
                Err(Errno::INTR) => {}
                Err(cause) => return Err(cause).context("userfaultfd"),
            }
        }
        let address = event.get(ADDRESS..).and_then(|bytes| bytes.first_chunk()).context("no address")?;
        Ok(u64::from_ne_bytes(*address) & !(PAGE_SIZE - 1))
    }

    fn answer(&self, address: u64) -> Result<()> {
        let mut call: ContinueCall = [address, self.pages * PAGE_SIZE, 0, 0];
        // SAFETY: UFFDIO_CONTINUE reads and writes a `struct uffdio_continue`, four words of 64 bits.
        let updater = unsafe { Updater::<CONTINUE, ContinueCall>::new(&mut call) };
        // SAFETY: it maps pages of the file where they belong, in a range that this descriptor was registered for.
        unsafe { ioctl(&self.fd, updater) }?;
        ensure!(call[3] == self.pages * PAGE_SIZE, "{} bytes are mapped", call[3]);
        Ok(())
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        drop(self.touch.take());
        // It ends with the channel; nobody is parked, because each round waits for its end.
        self.thread.take().map(JoinHandle::join);
    }
}

/// Reads the first word of so many places. How long that took.
fn touch_all(memory: &MmapRegion<()>, places: u64, pages: u64) -> Option<Duration> {
    let begin = Instant::now();
    for place in 0..places {
        let at = usize::try_from(place * pages * PAGE_SIZE).ok()?;
        let word: &AtomicU64 = memory.get_atomic_ref(at).ok()?;
        std::hint::black_box(word.load(Ordering::Relaxed));
    }
    Some(begin.elapsed())
}

fn register(start: u64, bytes: u64) -> Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | USER_MODE_ONLY;
    // SAFETY: a new descriptor changes nothing of this process until memory is registered with it.
    let fd = unsafe { userfaultfd(flags) }?;
    let mut call: ApiCall = [API, MINOR_SHMEM, 0];
    // SAFETY: UFFDIO_API reads and writes a `struct uffdio_api`, three words of 64 bits.
    let updater = unsafe { Updater::<HANDSHAKE, ApiCall>::new(&mut call) };
    // SAFETY: the handshake concerns this descriptor alone.
    unsafe { ioctl(&fd, updater) }?;
    let mut call: RegisterCall = [start, bytes, MINOR, 0];
    // SAFETY: UFFDIO_REGISTER reads and writes a `struct uffdio_register`, four words of 64 bits.
    let updater = unsafe { Updater::<REGISTER, RegisterCall>::new(&mut call) };
    // SAFETY: who touches a page there that is not mapped is parked until it is mapped; `round` maps each.
    unsafe { ioctl(&fd, updater) }?;
    Ok(fd)
}
