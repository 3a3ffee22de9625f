//! QEMU's program and a guest that attaches lists of pages to resources and detaches them.

use super::{DEPTH, memory_for, run, runs};
use crate::bench::Bench;
use crate::bench::peers::Peer;
use crate::bench::ring::{Driver, Wait};
use crate::bench::script::{Answer, Script};
use anyhow::{Result, ensure};
use rustix::thread::CpuSet;
use std::time::Duration;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING, VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING,
    VIRTIO_GPU_RESP_OK_NODATA,
};
use zerocopy::IntoBytes;

/// Entries of an ATTACH_BACKING, as QEMU bounds them.
const ENTRIES: u64 = 16_384;
const RESOURCE_CREATE_2D: u32 = 0x101;
const ROOM: u64 = 128;
/// Any address: it stays in the guest.
const VA: u64 = 0;

/// See the module.
pub struct Qemu {
    _peer: Peer,
    driver: Driver,
    script: Script,
    pages: u64,
    /// Commands of an operation.
    commands: usize,
}

impl Qemu {
    /// Lists of so many pages each.
    ///
    /// # Errors
    /// The program cannot be had, or refuses.
    pub fn new(bench: &Bench, core: CpuSet, pages: u64) -> Result<Self> {
        let peer = Peer::qemu_gpu(bench, core)?;
        let wait = if bench.cores.are_two() { Wait::Polling } else { Wait::Blocking };
        let driver = Driver::connect(&peer.socket(), 2, memory_for(1), wait)?;
        let lists = pages.div_ceil(ENTRIES);
        let commands = 2 * usize::try_from(lists)?;
        let mut qemu = Self { _peer: peer, driver, script: Script::default(), pages, commands };
        for instance in 0..(DEPTH / commands) as u64 + 1 {
            let resources = 1 + instance * lists..1 + (instance + 1) * lists;
            for resource in resources.clone() {
                qemu.create(u32::try_from(resource)?)?;
                qemu.attach(u32::try_from(resource)?)?;
            }
            for resource in resources {
                qemu.detach(u32::try_from(resource)?)?;
            }
        }
        Ok(qemu)
    }

    fn create(&mut self, resource: u32) -> Result<()> {
        // B8G8R8A8, 64 x 64: no size matters to what is attached.
        let form = [resource, 1, 64, 64];
        let answer = self.driver.command(&command(RESOURCE_CREATE_2D, &form), ROOM)?;
        let kind = answer.first_chunk().map(|kind| u32::from_le_bytes(*kind));
        ensure!(kind == Some(VIRTIO_GPU_RESP_OK_NODATA), "RESOURCE_CREATE_2D is answered {kind:x?}");
        Ok(())
    }

    fn attach(&mut self, resource: u32) -> Result<()> {
        let entries = self.pages.min(ENTRIES);
        let list: Vec<u8> = runs(self.driver.ram(), VA, entries, 1)
            .iter()
            .flat_map(|run| [run.gpa.get().to_le_bytes(), PAGE_SIZE.to_le_bytes()].concat())
            .collect();
        let form = [resource, u32::try_from(entries)?];
        let head = self.driver.place(&command(VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING, &form))?;
        let list = self.driver.place(&list)?;
        self.script.add(&self.driver, &[head, list], ROOM, Answer::NO_DATA)
    }

    fn detach(&mut self, resource: u32) -> Result<()> {
        let head = self.driver.place(&command(VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING, &[resource, 0]))?;
        self.script.add(&self.driver, &[head], ROOM, Answer::NO_DATA)
    }

    /// Pages a second.
    ///
    /// # Errors
    /// The program refuses.
    pub fn rate(&mut self, depth: usize, slice: Duration) -> Result<f64> {
        let done = run(&mut self.script, &mut self.driver.rings[0], depth, slice, |_| Ok(()))?;
        Ok(self.pages as f64 / (done.seconds_each() * self.commands as f64))
    }
}

/// A command of virtio-gpu: its header and words.
fn command(kind: u32, words: &[u32]) -> Vec<u8> {
    let mut bytes = CtrlHdr { kind: kind.into(), ..CtrlHdr::default() }.as_bytes().to_vec();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    bytes
}
