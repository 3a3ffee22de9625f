//! The serving process' side of the keeper: taking over the device, and memory on request.

use super::wire::{self, MAX_HANDOVER, Reply, Request};
use super::{Handover, Serving};
use crate::agent::{ArenaMemory, ArenaPages, ImportedPages};
use crate::driver::{self, DmaRegion, Rings, SvmDevice, Transport};
use crate::memory_file::MemoryFile;
use crate::socket::MessageSocket;
use rustix::event::{PollFd, PollFlags};
use rustix::process::PidfdFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
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

/// Memory that the keeper makes and holds.
pub struct KeeperMemory {
    /// One request at a time.
    socket: Mutex<MessageSocket>,
}

impl KeeperMemory {
    /// Asks over a socket on which the handover has been received.
    pub fn new(socket: MessageSocket) -> Self {
        Self { socket: Mutex::new(socket) }
    }

    fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = exchange(&socket, request, fds);
        if answered.is_err() {
            // A reply may still be on its way, and would be taken for that to the next request: one process would get
            // another one's memory. So there is none; the keeper replaces this process. Fails only when it is gone.
            rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both).ok();
        }
        answered
    }
}

fn exchange(
    socket: &MessageSocket,
    request: Request,
    fds: &[BorrowedFd<'_>],
) -> io::Result<(Reply, Vec<OwnedFd>)> {
    socket.send(&[&serde_json::to_vec(&request)?], fds, true)?;
    let mut buf = [0; wire::MAX_REQUEST];
    let received = socket.receive(&mut buf, true)?;
    Ok((serde_json::from_slice(buf.get(..received.len).unwrap_or_default())?, received.fds))
}

impl ArenaMemory for KeeperMemory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let (reply, fds) = self.ask(Request::Create { len }, &[])?;
        let mut fds = fds.into_iter();
        match (reply, fds.next(), fds.next()) {
            (Reply::Created { id }, Some(fd), Some(pages)) => match wire::pages_from_file(pages) {
                Ok(pages) => Ok(ArenaPages { id, fd, offset: 0, pages }),
                Err(error) => {
                    self.release(id);
                    Err(error)
                }
            },
            // The kernel had no room for the descriptors here, but the keeper has made the memory.
            (Reply::Created { id }, ..) => {
                self.release(id);
                Err(io::Error::from(io::ErrorKind::OutOfMemory))
            }
            _ => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
        }
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let request = Request::Import { offset: file.offset(), len: file.len() };
        let (reply, fds) = self.ask(request, &[file.as_fd()])?;
        match (reply, fds.into_iter().next()) {
            (Reply::Imported { id }, Some(pages)) => match wire::pages_from_file(pages) {
                Ok(pages) => Ok(ImportedPages { id, pages }),
                Err(error) => {
                    self.release(id);
                    Err(error)
                }
            },
            (Reply::Imported { id }, None) => {
                self.release(id);
                Err(io::Error::from(io::ErrorKind::OutOfMemory))
            }
            (Reply::NotImported { errno }, _) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
        }
    }

    fn hold(&self, ring: OwnedFd) -> io::Result<u64> {
        let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        match self.ask(Request::Hold { fd: ring.as_raw_fd() }, &[own.as_fd()])?.0 {
            Reply::Held { id } => Ok(id),
            Reply::NotImported { errno } => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
        }
    }

    fn release(&self, id: u64) {
        // Fails only when the keeper is gone, and then so is everything that it held.
        self.ask(Request::Release { id }, &[]).ok();
    }
}

/// Whether the keeper has gone, after waiting at most `timeout` for that.
pub fn keeper_gone(socket: &impl AsFd, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let Ok(timeout) = timeout.try_into() else { return false };
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(_) => fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests;
