//! The serving process' side of the keeper: taking over the device, and memory on request.

use super::wire::{self, MAX_HANDOVER, Reply, Request};
use super::{Handover, Serving};
use crate::agent::{ArenaMemory, ArenaPages};
use crate::driver::{self, DmaRegion, Rings, SvmDevice, Transport};
use crate::socket::MessageSocket;
use rustix::event::{PollFd, PollFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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
        // Fails only when it has ended already.
        self.child.kill().ok();
        // Reaped: nothing of it runs, so nothing writes to rings or registers.
        self.child.wait().ok();
    }
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

    fn ask(&self, request: Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = exchange(&socket, request);
        if answered.is_err() {
            // A reply may still be on its way, and would be taken for that to the next request: one process would get
            // another one's memory. So there is none; the keeper replaces this process. Fails only when it is gone.
            rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both).ok();
        }
        answered
    }
}

fn exchange(socket: &MessageSocket, request: Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
    socket.send(&[&serde_json::to_vec(&request)?], &[], true)?;
    let mut buf = [0; wire::MAX_REQUEST];
    let received = socket.receive(&mut buf, true)?;
    Ok((serde_json::from_slice(buf.get(..received.len).unwrap_or_default())?, received.fds))
}

impl ArenaMemory for KeeperMemory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let (reply, fds) = self.ask(Request::Create { len })?;
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

    fn release(&self, id: u64) {
        // Fails only when the keeper is gone, and then so is everything that it held.
        self.ask(Request::Release { id }).ok();
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
