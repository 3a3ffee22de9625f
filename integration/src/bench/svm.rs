//! Our side: a daemon on one core, guests that connect to it, and what their processes ask for before anything is timed.

use super::Bench;
use super::ring::{Driver, Wait};
use crate::svmd::{Options, Svmd};
use crate::wire;
use anyhow::{Context, Result, ensure};
use rustix::thread::CpuSet;
use tempfile::TempDir;
use virtio_gpu_svm::protocol::NUM_QUEUES;
use virtio_gpu_svm::protocol::control::{InvalidateResp, SvmResp};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::request::{VmCreateRsp, VmProperty};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// Bytes for answers of set-up commands.
const ROOM: u64 = 512;

/// A daemon with one soft device of one engine and as little else as can be.
pub struct Daemon {
    svmd: Svmd,
    _folder: TempDir,
}

impl Daemon {
    /// One on a core, for guests `vm0`, `vm1`, ..., with further lines of configuration.
    ///
    /// # Errors
    /// It does not start.
    pub fn launch(bench: &Bench, core: CpuSet, guests: usize, more: &str) -> Result<Self> {
        let guests = (0..guests).map(|guest| format!("vm{guest}")).collect();
        let more = more.to_owned();
        let options = Options { guests, devices: 1, ledger: 0, more, ..Options::default() };
        let folder = tempfile::tempdir()?;
        let svmd = bench.cores.on(core, || Svmd::start(&bench.svmd, folder.path(), &options))?;
        // It answers when all guests' sockets are there.
        svmd.call("guest.list", serde_json::json!({}))?;
        Ok(Self { svmd, _folder: folder })
    }

    /// A guest with so much memory, whose driver has said HELLO.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn connect(&self, guest: usize, memory: u64, wait: Wait) -> Result<Driver> {
        let socket = self.svmd.socket(&format!("vm{guest}"));
        let mut driver = Driver::connect(&socket, NUM_QUEUES, memory, wait)?;
        accepted(&mut driver, &wire::hello(1))?;
        Ok(driver)
    }
}

/// Withdraws pages of a process, and tells the sequence of that and what is done already.
///
/// # Errors
/// The device refuses.
pub fn invalidate(driver: &mut Driver, ctx_id: u32, start: u64, bytes: u64) -> Result<(u64, u64)> {
    let answer = driver.command(&wire::invalidate(ctx_id, start, bytes), ROOM)?;
    check(&answer)?;
    let (answer, _) = InvalidateResp::read_from_prefix(&answer).ok().context("a short answer")?;
    Ok((answer.seq.get(), answer.resp.inval_done_seq.get()))
}

/// Carries out a command that must be accepted.
///
/// # Errors
/// It is not.
pub fn accepted(driver: &mut Driver, command: &[u8]) -> Result<()> {
    let answer = driver.command(command, ROOM)?;
    check(&answer).map(drop)
}

/// Creates a context with a GPU VM on device 0, and tells its `vm_id`.
///
/// # Errors
/// The device refuses.
pub fn create_process(driver: &mut Driver, ctx_id: u32) -> Result<u32> {
    accepted(driver, &wire::create_context(ctx_id))?;
    let reply: VmCreateRsp = reply(driver, &wire::create_vm(ctx_id))?;
    Ok(reply.vm_id.get())
}

/// How a GPU VM fares.
///
/// # Errors
/// The device refuses.
pub fn property(driver: &mut Driver, ctx_id: u32, vm_id: u32) -> Result<VmProperty> {
    reply(driver, &wire::property(ctx_id, vm_id))
}

fn reply<T: FromBytes + KnownLayout + Immutable>(driver: &mut Driver, command: &[u8]) -> Result<T> {
    let answer = driver.command(command, ROOM)?;
    let (reply, _) = T::read_from_prefix(check(&answer)?).ok().context("a short reply")?;
    Ok(reply)
}

/// What stands behind the head of an answer that must be one of success.
fn check(answer: &[u8]) -> Result<&[u8]> {
    let (head, rest) = SvmResp::read_from_prefix(answer).ok().context("a short answer")?;
    let status = head.status.get();
    ensure!(status == 0, "a command is refused: {}, {}", errno::name(status), head.detail);
    Ok(rest)
}
