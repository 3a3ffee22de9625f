//! The serving process' side of the keeper: taking over the device, and memory on request.

use super::wire::{self, Answered, Asked, MAX_HANDOVER, Reply, Request};
use super::{Handover, Serving};
use crate::agent::{ArenaMemory, ArenaPages, ImportedPages};
use crate::driver::{self, DmaRegion, Rings, SvmDevice, Transport};
use crate::memory_file::MemoryFile;
use crate::socket::MessageSocket;
use crate::wait;
use rustix::process::PidfdFlags;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The name of the hidden subcommand that runs a serving process; its standard input is the keeper's socket.
pub const SUBCOMMAND: &str = "serve-for-keeper";

/// Starts this program again as a serving process, with `arguments` after the subcommand.
///
/// # Errors
/// When it cannot be started.
pub fn spawn(socket: OwnedFd, arguments: &[String]) -> io::Result<Box<dyn Serving>> {
    let mut command = Command::new("/proc/self/exe");
    // For those who look at a list of processes.
    command.arg0("svm-agent");
    command.arg(SUBCOMMAND).args(arguments).stdin(Stdio::from(socket));
    Ok(Box::new(ServingProcess { child: command.spawn()? }))
}

struct ServingProcess {
    child: Child,
}

impl Serving for ServingProcess {
    fn end(&mut self) {
        end_child(&mut self.child);
    }
}

/// Kills a child and returns when none of its instructions is carried out any more, so that it writes to no ring and no
/// register. It may not be gone by then: a thread that is in the kernel for a file of a process (one of a FUSE server that
/// does not answer) ends when the kernel is done with that, and processes must not decide when the keeper goes on.
fn end_child(child: &mut Child) {
    // Fails only when it has ended already.
    child.kill().ok();
    while let Ok(None) = child.try_wait() {
        if is_stuck(child.id()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether all threads of a process that was killed have ended or wait in the kernel for something that no signal ends:
/// from there none returns to its program.
fn is_stuck(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let is_out = |thread: io::Result<std::fs::DirEntry>| {
        let stat = thread.and_then(|thread| std::fs::read_to_string(thread.path().join("stat")));
        // The name before the state may hold anything.
        let state = stat.ok().and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
        matches!(state, Some('D' | 'Z' | 'X'))
    };
    threads.into_iter().all(is_out)
}

/// Takes the device over: the handover and the descriptors of the hardware.
///
/// # Errors
/// When the keeper is gone or sends something else.
pub fn take_over(socket: &MessageSocket) -> io::Result<(Handover, Arc<DmaRegion>, Vec<OwnedFd>)> {
    let mut buf = vec![0; MAX_HANDOVER];
    let received = socket.receive(&mut buf, true)?;
    let handover: Handover = serde_json::from_slice(buf.get(..received.len).unwrap_or_default())?;
    let mut fds = received.fds.into_iter();
    let ring = fds.next().ok_or(io::Error::other("the keeper sent no ring memory"))?;
    let dma = DmaRegion::from_fd(ring.as_fd(), 0, handover.ring_pages.clone()).map_err(io::Error::other)?;
    Ok((handover, Arc::new(dma), fds.collect()))
}

/// Drives the device that was taken over.
///
/// # Errors
/// As [`SvmDevice::new`].
pub fn drive(
    handover: &Handover,
    dma: Arc<DmaRegion>,
    transport: Arc<dyn Transport>,
) -> driver::Result<SvmDevice> {
    SvmDevice::new(transport, dma, &Rings::new(handover.rings)?)
}

/// Memory that the keeper makes and holds. Any number of threads may ask at once.
pub struct KeeperMemory {
    asking: Arc<Asking>,
}

/// An answer and what came with it.
type Reception = (Reply, Vec<OwnedFd>);

struct Asking {
    socket: MessageSocket,
    last_number: AtomicU64,
    /// Who waits for which answer; `None` once the conversation has ended.
    waiting: Mutex<Option<HashMap<u64, SyncSender<Reception>>>>,
}

impl KeeperMemory {
    /// Asks over a socket on which the handover has been received.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(socket: MessageSocket) -> io::Result<Self> {
        let (last_number, waiting) = (AtomicU64::new(0), Mutex::new(Some(HashMap::new())));
        let asking = Arc::new(Asking { socket, last_number, waiting });
        let hearing = asking.clone();
        std::thread::Builder::new().name("svm-keeper".into()).spawn(move || hearing.hear())?;
        Ok(Self { asking })
    }
}

impl Drop for KeeperMemory {
    fn drop(&mut self) {
        self.asking.end();
    }
}

impl Asking {
    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u64, SyncSender<Reception>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands answers to those who wait for them. After one that is not understood there is no other one: the keeper
    /// replaces this process.
    fn hear(&self) {
        while self.hear_one().is_some() {}
        self.end();
    }

    fn hear_one(&self) -> Option<()> {
        let mut buf = [0; wire::MAX_REQUEST];
        let received = self.socket.receive(&mut buf, true).ok()?;
        let answered: Answered = serde_json::from_slice(buf.get(..received.len)?).ok()?;
        let waiting = self.waiting().as_mut()?.remove(&answered.number)?;
        // There is room for one, and it waits.
        waiting.send((answered.reply, received.fds)).ok()
    }

    fn end(&self) {
        // Whoever waits hears of it by that.
        drop(self.waiting().take());
        // Fails only when the other end is gone.
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).ok();
    }

    fn tell(&self, number: u64, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let told = self.socket.send(&[&serde_json::to_vec(&Asked { number, request })?], fds, true);
        if told.is_err() {
            self.end();
        }
        told
    }

    fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<Reception> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let number = self.last_number.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, answer) = mpsc::sync_channel(1);
        self.waiting().as_mut().ok_or_else(gone)?.insert(number, sender);
        self.tell(number, request, fds)?;
        answer.recv().map_err(|_| gone())
    }

    /// Asks for memory: its name, the descriptors before the list of its pages, and that list.
    fn ask_for_memory(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
        before: usize,
    ) -> io::Result<(u64, Vec<OwnedFd>, Vec<u64>)> {
        let (reply, mut fds) = self.ask(request, fds)?;
        let id = kept(reply)?;
        // The kernel may have had no room for the descriptors here, but the keeper has the memory.
        let list = if fds.len() == before + 1 { fds.pop() } else { None };
        let pages = list.ok_or(io::Error::from(io::ErrorKind::OutOfMemory)).and_then(wire::pages_from_file);
        match pages {
            Ok(pages) => Ok((id, fds, pages)),
            Err(error) => {
                self.release(id);
                Err(error)
            }
        }
    }

    fn release(&self, id: u64) {
        // Fails only when the keeper is gone, and then so is everything that it held.
        self.tell(0, Request::Release { id }, &[]).ok();
    }
}

fn kept(reply: Reply) -> io::Result<u64> {
    match reply {
        Reply::Kept { id } => Ok(id),
        Reply::Refused { errno } => Err(io::Error::from_raw_os_error(errno)),
    }
}

impl ArenaMemory for KeeperMemory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let (id, fds, pages) = self.asking.ask_for_memory(Request::Create { len }, &[], 1)?;
        // One that was asked for is there.
        let fd = fds.into_iter().next().ok_or(io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(ArenaPages { id, fd, offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let request = Request::Import { offset: file.offset(), len: file.len() };
        let (id, _, pages) = self.asking.ask_for_memory(request, &[file.as_fd()], 0)?;
        Ok(ImportedPages { id, pages })
    }

    fn hold(&self, ring: OwnedFd) -> io::Result<u64> {
        let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        kept(self.asking.ask(Request::Hold { fd: ring.as_raw_fd() }, &[own.as_fd()])?.0)
    }

    fn release(&self, id: u64) {
        self.asking.release(id);
    }
}

/// Whether the keeper has gone, after waiting at most `timeout` for that.
pub fn keeper_gone(socket: &impl AsFd, timeout: Duration) -> bool {
    wait::hung_up(socket, Some(timeout)) == Ok(true)
}

#[cfg(test)]
mod tests;
