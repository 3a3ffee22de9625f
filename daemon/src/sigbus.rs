//! Guest memory that goes away under us, and what becomes of whoever touches it.
//!
//! A file can be shorter than its mapping: its VMM has shrunk it, it is of hugetlbfs and the pool is empty, or the host's
//! memory has failed. Who touches such a page gets SIGBUS. The handler looks the address up in a table of all mappings
//! of guest memory, puts private zeros in place of the whole mapping, and wakes the session that it belongs to, which
//! then ends. The access is repeated and goes on with zeros: no thread has to leave the code it is in. Any other address
//! is a bug of ours, and ends the process as SIGBUS does.
//!
//! [`watch_region`] and [`WatchedMap`] own what they watch, so a guard never outlives its mapping, and no address in the
//! table is anybody else's. The handler takes no lock, allocates nothing and frees nothing: slots are never freed, and
//! each says by its version whether it was read whole. The slot of the mapping that is being touched does not change
//! meanwhile, because whoever touches it holds it.

#![expect(
    unsafe_code,
    reason = "a signal's handler, and memory put in place of other memory, have no safe wrapper"
)]

use crate::eventq::Waker;
use libc::{c_int, c_void, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use virtio_gpu_svm::memory::{Region, RegionIdentity, Watch};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Slots that are made together.
const BLOCK: usize = 128;
/// No guest-physical address.
const NOWHERE: u64 = u64::MAX;
/// No thread.
const NOBODY: i32 = 0;
/// A thread of another process, which has no number here.
const WORKER: i32 = -1;

/// Memory of one session that was found missing.
#[derive(Debug)]
pub struct Loss {
    waker: Arc<Waker>,
    /// Where its region stands, or [`NOWHERE`].
    gpa: AtomicU64,
    /// The thread that touched it.
    thread: AtomicI32,
}

impl Loss {
    /// None so far; `waker` is set with the first.
    pub fn new(waker: Arc<Waker>) -> Arc<Self> {
        Arc::new(Self { waker, gpa: AtomicU64::new(NOWHERE), thread: AtomicI32::new(NOBODY) })
    }

    /// Where the region stands of which memory was found missing first, and the thread that found it, if it is one of
    /// this process.
    pub fn found(&self) -> Option<(u64, Option<i32>)> {
        let gpa = self.gpa.load(SeqCst);
        (gpa != NOWHERE).then(|| (gpa, Some(self.thread.load(SeqCst)).filter(|thread| *thread != WORKER)))
    }

    /// Async-signal-safe.
    fn tell(&self, gpa: u64, thread: i32) {
        if self.thread.compare_exchange(NOBODY, thread, SeqCst, SeqCst).is_ok() {
            self.gpa.store(gpa, SeqCst);
            self.waker.wake();
        }
    }
}

/// A region whose memory may go: its session is woken then.
///
/// # Errors
/// The kernel refuses a handler.
pub fn watch_region(
    identity: RegionIdentity,
    mapping: MmapRegion<()>,
    loss: &Arc<Loss>,
) -> std::io::Result<Arc<Region>> {
    // A region drops its watch before its mapping, and gives neither away.
    let guard = Guard::new(&mapping, identity.gpa, loss)?;
    Ok(Region::watched(identity, mapping, guard))
}

/// The framework's map of guest memory, which rings use and which may go the same way.
#[derive(Debug, Default)]
pub struct WatchedMap {
    /// First: dropped before the map.
    _guards: Vec<Guard>,
    map: Arc<GuestMemoryMmap>,
}

impl WatchedMap {
    /// Watches over all of a map.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub fn new(map: Arc<GuestMemoryMmap>, loss: &Arc<Loss>) -> std::io::Result<Self> {
        let guards = map.iter().map(|region| Guard::new(region, region.start_addr().0, loss));
        Ok(Self { _guards: guards.collect::<Result<_, _>>()?, map })
    }

    /// The map.
    pub fn map(&self) -> &Arc<GuestMemoryMmap> {
        &self.map
    }
}

/// A mapping's place in the table.
#[derive(Debug)]
struct Guard {
    slot: &'static Slot,
    gpa: u64,
    loss: Arc<Loss>,
}

impl Guard {
    /// To be dropped before the mapping.
    fn new(mapping: &MmapRegion<()>, gpa: u64, loss: &Arc<Loss>) -> std::io::Result<Self> {
        install()?;
        let slot = take_slot(&Entry {
            start: mapping.as_ptr().addr(),
            bytes: mapping.size(),
            gpa,
            loss: Arc::as_ptr(loss).cast_mut(),
        });
        Ok(Self { slot, gpa, loss: Arc::clone(loss) })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let writing = lock();
        self.slot.write(&FREE);
        drop(writing);
    }
}

impl Watch for Guard {
    fn lost(&self) {
        self.loss.tell(self.gpa, WORKER);
    }
}

/// A mapping, and whose it is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: usize,
    bytes: usize,
    gpa: u64,
    loss: *mut Loss,
}

const FREE: Entry = Entry { start: 0, bytes: 0, gpa: 0, loss: std::ptr::null_mut() };

/// An [`Entry`] that is written under [`WRITING`] and read by handlers at any time.
#[derive(Debug)]
struct Slot {
    /// Odd while it is written; another one afterwards.
    version: AtomicU64,
    start: AtomicUsize,
    bytes: AtomicUsize,
    gpa: AtomicU64,
    loss: AtomicPtr<Loss>,
}

impl Slot {
    const fn free() -> Self {
        Self {
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            gpa: AtomicU64::new(0),
            loss: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    fn is_free(&self) -> bool {
        self.loss.load(SeqCst).is_null()
    }

    /// Under [`WRITING`].
    fn write(&self, entry: &Entry) {
        self.version.fetch_add(1, SeqCst);
        self.start.store(entry.start, SeqCst);
        self.bytes.store(entry.bytes, SeqCst);
        self.gpa.store(entry.gpa, SeqCst);
        self.loss.store(entry.loss, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    /// `None` if it is being written: then it is of no mapping that somebody is in. Async-signal-safe.
    fn read(&self) -> Option<Entry> {
        let before = self.version.load(SeqCst);
        let entry = Entry {
            start: self.start.load(SeqCst),
            bytes: self.bytes.load(SeqCst),
            gpa: self.gpa.load(SeqCst),
            loss: self.loss.load(SeqCst),
        };
        (before.is_multiple_of(2) && before == self.version.load(SeqCst)).then_some(entry)
    }
}

/// Part of the table; never freed.
struct Block {
    slots: [Slot; BLOCK],
    next: OnceLock<Box<Block>>,
}

impl Block {
    const fn new() -> Self {
        Self { slots: [const { Slot::free() }; BLOCK], next: OnceLock::new() }
    }
}

static TABLE: Block = Block::new();
/// Guards who writes slots.
static WRITING: Mutex<()> = Mutex::new(());

fn lock() -> MutexGuard<'static, ()> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take_slot(entry: &Entry) -> &'static Slot {
    let writing = lock();
    let mut block = &TABLE;
    let slot = loop {
        if let Some(free) = block.slots.iter().find(|slot| slot.is_free()) {
            break free;
        }
        block = block.next.get_or_init(|| Box::new(Block::new()));
    };
    slot.write(entry);
    drop(writing);
    slot
}

/// The mapping of guest memory at an address. Async-signal-safe.
fn lookup(addr: usize) -> Option<Entry> {
    let mut block = Some(&TABLE);
    while let Some(Block { slots, next }) = block {
        let found = slots
            .iter()
            .filter_map(Slot::read)
            .find(|entry| addr.checked_sub(entry.start).is_some_and(|inside| inside < entry.bytes));
        if found.is_some() {
            return found;
        }
        block = next.get().map(|next| &**next);
    }
    None
}

/// Makes this process handle SIGBUS; once.
fn install() -> std::io::Result<()> {
    static DONE: OnceLock<Option<i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let handler = on_sigbus as extern "C" fn(_, _, _) as *const () as usize;
        set_action(handler, libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART)
            .err()
            .map(|error| error.raw_os_error().unwrap_or(0))
    });
    done.map_or(Ok(()), |errno| Err(std::io::Error::from_raw_os_error(errno)))
}

/// Async-signal-safe.
fn set_action(handler: usize, flags: c_int) -> std::io::Result<()> {
    // SAFETY: zero is a valid value of every field.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the action is valid: the default one, or `on_sigbus`, which is async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes the cause, because of SA_SIGINFO.
    let info = unsafe { &*info };
    let code = info.si_code;
    // Memory has failed that nobody is touching now. Who touches it later comes here again.
    if code == libc::BUS_MCEERR_AO {
        return;
    }
    // SAFETY: a SIGBUS of the kernel has an address; one that was sent has other numbers there, and is not looked up.
    let addr = unsafe { info.si_addr() }.addr();
    // SAFETY: no arguments; the thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread lives.
    let before = unsafe { errno.read() };
    // Sent by a process: codes of the kernel are positive.
    let sent = code <= 0;
    let replaced = !sent && lookup(addr).is_some_and(|entry| replace(&entry));
    if !replaced {
        // The instruction is repeated, and has its usual end. Nothing is to be done if this fails.
        set_action(libc::SIG_DFL, 0).ok();
        if sent {
            // SAFETY: async-signal-safe; it comes when this handler has returned.
            unsafe { libc::raise(libc::SIGBUS) };
        }
    }
    // SAFETY: as above.
    unsafe { errno.write(before) };
}

/// Puts zeros in place of a mapping that a thread is in, and wakes its session. Async-signal-safe.
///
/// The whole mapping, not the page: one signal is then all that a mapping can cost, also where the whole of 1 TiB has
/// gone; and pages of hugetlbfs, whose size nobody needs to know, are never cut.
fn replace(entry: &Entry) -> bool {
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let start = std::ptr::without_provenance_mut(entry.start);
    // SAFETY: the range is a mapping of guest memory as a whole: the thread is in it, so it stays, and so does its slot.
    // Other threads see zeros where it was, which is nothing that a guest could not have written.
    if unsafe { mmap_anonymous(start, entry.bytes, rights, flags) }.is_err() {
        return false;
    }
    // SAFETY: the guard of this slot holds it, and is dropped after its mapping is left alone.
    let loss = unsafe { &*entry.loss };
    loss.tell(entry.gpa, rustix::thread::gettid().as_raw_nonzero().get());
    true
}

#[cfg(test)]
mod tests;
