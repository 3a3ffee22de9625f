//! The daemon's side of a round trip: a command comes out of a ring, is carried out, and its answer goes back. The
//! driver makes the same chain available each time; the kick, the call and the wake-ups between are not here.

use std::sync::Arc;

use anyhow::{Context, Result};
use daemon::queue::{Budget, Served, Turn};
use daemon::ring::Ring;
use std::ops::ControlFlow;
use std::time::Duration;
use vhost_user_backend::VringT;
use virtio_gpu_svm::busy_poll::{BusyPoll, Monotonic};
use virtio_gpu_svm::guest::Guest;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::bulk::nothing;
use super::scene::Scene;
use super::workload::{MAPPINGS, Operation};

const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const COMMAND: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const ROOM: u32 = 4096;
const MEMORY_BYTES: usize = 0x10_0000;
/// Descriptor flags: another follows, the device writes.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A control queue, and the guest behind it.
pub struct RoundTrip {
    scene: Scene,
    memory: Arc<GuestMemoryMmap>,
    ring: Ring,
    avail: u16,
}

impl RoundTrip {
    /// Of the request that changes nothing.
    pub fn boxed() -> Result<Box<dyn Operation>> {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?);
        let ring = Ring::new(GuestMemoryAtomic::from(Arc::clone(&memory)), SIZE)?;
        ring.set_queue_size(SIZE);
        ring.set_queue_info(DESC, AVAIL, USED)?;
        ring.set_queue_event_idx(true);
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        let command = nothing();
        memory.write_slice(&command, GuestAddress(COMMAND))?;
        let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
            [addr, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48]
        };
        let buffer = descriptor(COMMAND, u32::try_from(command.len())?, NEXT, 1);
        memory.write_obj(buffer, GuestAddress(DESC))?;
        memory.write_obj(descriptor(ANSWER, ROOM, WRITE, 0), GuestAddress(DESC + 16))?;
        Ok(Box::new(Self { scene: Scene::new(MAPPINGS)?, memory, ring, avail: 0 }))
    }

    fn turn(&mut self) -> Result<bool> {
        // Each slot of the available ring names chain 0 anyhow.
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2))?;
        let memory = || Arc::clone(&self.memory);
        let mut turn =
            Turn::begin(&self.ring, Budget::COMMANDS, memory)?.context("the ring is not served")?;
        let scene = &self.scene;
        let mut poll = BusyPoll::new(Monotonic::default(), Duration::ZERO);
        let served = turn.serve(&mut poll, Guest::is_brief, |command, answer, room| {
            scene.answer(command, answer, room);
            ControlFlow::Continue(())
        })?;
        turn.finish()?;
        Ok(served == Served::Empty)
    }
}

impl Operation for RoundTrip {
    fn run(&mut self, _: u64) -> bool {
        self.turn().unwrap_or(false)
    }

    fn is_done(&self, count: u64) -> bool {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap_or(0);
        u64::from(used) == count % (1 << 16)
    }
}
