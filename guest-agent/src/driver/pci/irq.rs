//! Interrupts of the function: INTx through uio_pci_generic, or none and a look every now and then.

use super::{Error, PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, Result, discovery, file_error};
use crate::mapping::SharedMapping;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const DRIVER: &str = "uio_pci_generic";
/// How often to look without interrupts.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

/// Which interrupts to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqMode {
    /// uio_pci_generic if it can be had, else polling.
    Auto,
    /// uio_pci_generic or nothing.
    Uio,
    /// Polling, every half millisecond.
    Poll,
}

/// Binds uio_pci_generic as `mode` wants, and opens the function's uio file.
pub(super) fn bind(address: &str, mode: IrqMode) -> Result<Option<OwnedFd>> {
    if mode == IrqMode::Poll {
        return Ok(None);
    }
    match (mode, uio(address)) {
        (_, Ok(Some(uio))) => Ok(Some(uio)),
        (IrqMode::Uio, Ok(None)) => Err(Error::NoUio),
        (IrqMode::Uio, Err(error)) => Err(error),
        (IrqMode::Auto | IrqMode::Poll, _) => {
            // The driver may have the function all the same, only its file cannot be used.
            discovery::unbind(address)?;
            Ok(None)
        }
    }
}

fn uio(address: &str) -> Result<Option<OwnedFd>> {
    if !discovery::bind(address, DRIVER)? {
        return Ok(None);
    }
    let directory = discovery::directory(address).join("uio");
    let mut entries = std::fs::read_dir(&directory).map_err(file_error("cannot list", directory))?;
    let Some(Ok(entry)) = entries.next() else { return Ok(None) };
    let path = Path::new("/dev").join(entry.file_name());
    let file = File::options().read(true).write(true).open(&path);
    Ok(Some(file.map_err(file_error("cannot open", path))?.into()))
}

/// A way to wait.
pub(super) enum Irq {
    /// Reading `uio` says that there was an interrupt; the kernel has masked INTx then.
    Uio {
        /// The function's uio file.
        uio: File,
        /// Its config space.
        config: File,
        /// Its registers.
        bar: Arc<SharedMapping>,
        /// Offset of the interrupt status.
        isr: usize,
    },
    /// Sleeping.
    Poll,
}

impl Irq {
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let Irq::Uio { uio, config, bar, isr } = self else {
            std::thread::sleep(POLL_INTERVAL.min(timeout));
            return Ok(true);
        };
        let mut fds = [PollFd::new(uio, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(false),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut count = [0; 4];
        (&mut &*uio).read_exact(&mut count)?;
        // Reading the status takes the line down; unmasking before that would interrupt at once again.
        let _status: u8 = bar.register(*isr).map_err(io::Error::other)?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, PCI_COMMAND)?;
        let unmasked = u16::from_le_bytes(command) & !PCI_COMMAND_INTX_DISABLE;
        config.write_all_at(&unmasked.to_le_bytes(), PCI_COMMAND)?;
        Ok(true)
    }
}
