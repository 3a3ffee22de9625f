//! A frontend that costs little beside what it measures, for any virtio-gpu or other backend: ours, the crates' null
//! backend, QEMU's program.
//!
//! [`Driver`] owns a connection and its rings. A [`Ring`] is driven by atomic accesses to guest memory; descriptors are
//! written once.

use super::peers;
use crate::frontend::RingAddresses;
use crate::frontend::ram::{GuestRam, Layout};
use anyhow::{Context, Result, ensure};
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Descriptors of each ring: the most that each of the backends takes.
pub const RING_SIZE: u16 = 1024;
/// Descriptors of a chain at most, so that each has its place in the table.
const CHAIN: u16 = 3;
/// Chains of a ring at most.
pub const CHAINS: usize = 256;
/// Bytes of a command that is no script's, and of its answer.
const SCRATCH: u64 = 256 << 10;
/// Bytes of an answer's place.
const ANSWER: u64 = 512;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
const CACHE_LINE: u64 = 64;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Looks at a ring between two looks at the clock.
const LOOKS: u32 = 1 << 20;

/// How the driver waits for a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Asleep, to be interrupted.
    Blocking,
    /// It looks; interrupts are not wanted.
    Polling,
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest-physical address.
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
    /// Whether the device writes.
    pub writable: bool,
}

/// A split ring with EVENT_IDX.
pub struct Ring {
    ram: Arc<GuestRam>,
    at: RingAddresses,
    kick: EventFd,
    call: EventFd,
    epoll: Epoll,
    wait: Wait,
    offered: u16,
    published: u16,
    used: u16,
}

impl Ring {
    fn new(ram: &Arc<GuestRam>, wait: Wait) -> Result<Self> {
        let entries = u64::from(RING_SIZE);
        let at = RingAddresses {
            size: RING_SIZE,
            desc: ram.take_dma(16 * entries)?,
            avail: ram.take_dma(6 + 2 * entries)?,
            used: ram.take_dma(6 + 8 * entries)?,
        };
        // Backends set the flag, or do not; so it is the same for all.
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let ring = Self { ram: ram.clone(), at, kick, call, epoll, wait, offered: 0, published: 0, used: 0 };
        ring.want_interrupts(wait == Wait::Blocking)?;
        Ok(ring)
    }

    fn u16_at(&self, gpa: u64) -> Result<&AtomicU16> {
        self.ram.atomic(gpa)
    }

    /// Writes the chain that begins at `head`.
    ///
    /// # Errors
    /// It is too long.
    pub fn write_chain(&self, head: u16, buffers: &[Buffer]) -> Result<()> {
        ensure!(buffers.len() <= usize::from(CHAIN), "a chain of {} buffers", buffers.len());
        for (index, buffer) in (head..).zip(buffers) {
            let last = usize::from(index - head) + 1 == buffers.len();
            let flags = u16::from(!last) | u16::from(buffer.writable) << 1;
            let at = self.at.desc + 16 * u64::from(index);
            let mut descriptor = buffer.at.to_le_bytes().to_vec();
            descriptor.extend(u32::try_from(buffer.bytes)?.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index + 1).to_le_bytes());
            self.ram.write(at, &descriptor)?;
        }
        Ok(())
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Changes the length of a chain's first buffer.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn set_len(&self, head: u16, bytes: u32) -> Result<()> {
        let len: &AtomicU32 = self.ram.atomic(self.at.desc + 16 * u64::from(head) + 8)?;
        len.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Makes a chain available, once it is published.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn offer(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.offered % self.at.size);
        self.u16_at(self.at.avail + 4 + 2 * slot)?.store(head, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
        Ok(())
    }

    /// Publishes what was offered, and rings the doorbell if that is wanted.
    ///
    /// # Errors
    /// The doorbell cannot be rung.
    pub fn publish(&mut self) -> Result<()> {
        if self.offered == self.published {
            return Ok(());
        }
        self.u16_at(self.at.avail + 2)?.store(self.offered, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.u16_at(self.at.used + 4 + 8 * u64::from(self.at.size))?.load(Ordering::Relaxed);
        let passed = self.offered.wrapping_sub(event).wrapping_sub(1);
        if passed < self.offered.wrapping_sub(self.published) {
            self.kick.write(1)?;
        }
        self.published = self.offered;
        Ok(())
    }

    /// The next chain that was given back, if any: its head and how much was written.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn take_used(&mut self) -> Result<Option<(u32, u32)>> {
        if self.u16_at(self.at.used + 2)?.load(Ordering::Acquire) == self.used {
            return Ok(None);
        }
        let entry = self.at.used + 4 + 8 * u64::from(self.used % self.at.size);
        let head: &AtomicU32 = self.ram.atomic(entry)?;
        let len: &AtomicU32 = self.ram.atomic(entry + 4)?;
        let taken = (head.load(Ordering::Relaxed), len.load(Ordering::Relaxed));
        self.used = self.used.wrapping_add(1);
        Ok(Some(taken))
    }

    /// Until the device interrupts.
    fn sleep(&self) -> Result<()> {
        let timeout = i32::try_from(PATIENCE.as_millis())?;
        let mut event = [EpollEvent::default()];
        let ready = self.epoll.wait(timeout, &mut event).context("epoll")?;
        ensure!(ready == 1, "the backend does not answer");
        self.call.read().context("call")?;
        Ok(())
    }

    /// Sets the index at which the device interrupts: the next one, or one that is far away.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn want_interrupts(&self, wanted: bool) -> Result<()> {
        let event = if wanted { self.used } else { self.used.wrapping_add(0x8000) };
        self.u16_at(self.at.avail + 4 + 2 * u64::from(self.at.size))?.store(event, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until a chain was given back.
    ///
    /// # Errors
    /// None is for a long time, or the interrupt is broken.
    pub fn await_used(&mut self) -> Result<()> {
        let used =
            |ring: &Self| Ok::<_, anyhow::Error>(ring.u16_at(ring.at.used + 2)?.load(Ordering::Acquire));
        if self.wait == Wait::Blocking {
            while used(self)? == self.used {
                self.want_interrupts(true)?;
                fence(Ordering::SeqCst);
                if used(self)? == self.used {
                    self.sleep()?;
                }
            }
            return Ok(());
        }
        self.want_interrupts(false)?;
        let mut begin = None;
        loop {
            for _ in 0..LOOKS {
                if used(self)? != self.used {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            let begin = begin.get_or_insert_with(Instant::now);
            ensure!(begin.elapsed() < PATIENCE, "the backend does not answer");
        }
    }
}

/// A connection and its rings.
pub struct Driver {
    ram: Arc<GuestRam>,
    /// Ring 0 is the one of commands.
    pub rings: Vec<Ring>,
    /// Room for a command that is no script's, and as much for its answer.
    scratch: u64,
    /// What is left of the page that small buffers are taken from, as a kernel's allocator does: buffers that all began a page
    /// would all be in one set of the caches.
    small: Cell<Range<u64>>,
    _frontend: Frontend,
}

impl Driver {
    /// Connects, with so many rings and so much guest memory, a quarter of which is for [`Driver::place`].
    ///
    /// # Errors
    /// The backend cannot be reached, or refuses.
    pub fn connect(socket: &Path, rings: usize, memory: u64, wait: Wait) -> Result<Self> {
        let ram = GuestRam::new(Layout::Flat { bytes: memory }, 1)?;
        let mut frontend = Frontend::from_stream(peers::connect(socket)?, rings as u64);
        let features = frontend.get_features().context("GET_FEATURES")?;
        let wanted =
            VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        ensure!(features & wanted == wanted, "features {features:#x} are offered");
        let offered = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let protocol = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(offered & protocol).context("SET_PROTOCOL_FEATURES")?;
        if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_owner().context("SET_OWNER")?;
        frontend.set_features(wanted).context("SET_FEATURES")?;
        frontend.set_mem_table(&ram.vhost_regions()).context("SET_MEM_TABLE")?;
        let rings: Vec<_> = (0..rings).map(|_| Ring::new(&ram, wait)).collect::<Result<_>>()?;
        for (index, ring) in rings.iter().enumerate() {
            start(&mut frontend, index, ring).with_context(|| format!("ring {index}"))?;
        }
        let scratch = ram.take_dma(2 * SCRATCH)?;
        Ok(Self { ram, rings, scratch, small: Cell::default(), _frontend: frontend })
    }

    /// Guest memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// From now on the driver waits so.
    ///
    /// # Errors
    /// None, if the rings are in guest memory.
    pub fn wait_by(&mut self, wait: Wait) -> Result<()> {
        for ring in &mut self.rings {
            ring.wait = wait;
            ring.want_interrupts(wait == Wait::Blocking)?;
        }
        Ok(())
    }

    /// Puts bytes into guest memory, where they stay.
    ///
    /// # Errors
    /// It is full.
    pub fn place(&self, bytes: &[u8]) -> Result<Buffer> {
        let at = self.take(bytes.len() as u64)?;
        self.ram.write(at, bytes)?;
        Ok(Buffer { at, bytes: bytes.len() as u64, writable: false })
    }

    /// Guest memory for a buffer.
    fn take(&self, bytes: u64) -> Result<u64> {
        let bytes = bytes.next_multiple_of(CACHE_LINE);
        if bytes >= PAGE_SIZE {
            return self.ram.take_dma(bytes);
        }
        let mut left = self.small.take();
        if left.end - left.start < bytes {
            let page = self.ram.take_dma(PAGE_SIZE)?;
            left = page..page + PAGE_SIZE;
        }
        let at = left.start;
        self.small.set(at + bytes..left.end);
        Ok(at)
    }

    /// Puts the chain of a script's command into its place on ring 0. Where its answer goes.
    ///
    /// # Errors
    /// Guest memory or the ring is full.
    pub fn place_chain(&self, place: usize, buffers: &[Buffer], room: u64) -> Result<(u16, u64)> {
        ensure!(place < CHAINS, "a script of more than {CHAINS} commands");
        let head = u16::try_from(place)? * CHAIN;
        let answer_at = self.take(ANSWER)?;
        let into = Buffer { at: answer_at, bytes: room.min(ANSWER), writable: true };
        self.rings[0].write_chain(head, &[buffers, &[into]].concat())?;
        Ok((head, answer_at))
    }

    /// Carries out one command on ring 0, on which nothing else may be in flight. Returns what was written of `room` bytes.
    ///
    /// # Errors
    /// They are too long, or no answer comes.
    pub fn command(&mut self, request: &[u8], room: u64) -> Result<Vec<u8>> {
        ensure!(request.len() as u64 <= SCRATCH && room <= SCRATCH, "a command too long");
        self.ram.write(self.scratch, request)?;
        let place = Buffer { at: self.scratch, bytes: request.len() as u64, writable: false };
        let into = Buffer { at: self.scratch + SCRATCH, bytes: room, writable: true };
        let ring = &mut self.rings[0];
        // Beyond the chains of scripts.
        let head = RING_SIZE - CHAIN;
        ring.write_chain(head, &[place, into])?;
        ring.offer(head)?;
        ring.publish()?;
        ring.await_used()?;
        let (_, len) = ring.take_used()?.context("nothing was given back")?;
        let mut answer = vec![0; len as usize];
        self.ram.read(into.at, &mut answer)?;
        Ok(answer)
    }
}

fn start(frontend: &mut Frontend, index: usize, ring: &Ring) -> Result<()> {
    let host = |gpa: u64| ring.ram.host_base() + gpa;
    let config = VringConfigData {
        queue_max_size: ring.at.size,
        queue_size: ring.at.size,
        flags: 0,
        desc_table_addr: host(ring.at.desc),
        used_ring_addr: host(ring.at.used),
        avail_ring_addr: host(ring.at.avail),
        log_addr: None,
    };
    frontend.set_vring_num(index, ring.at.size)?;
    frontend.set_vring_addr(index, &config)?;
    frontend.set_vring_base(index, 0)?;
    frontend.set_vring_call(index, &ring.call)?;
    frontend.set_vring_kick(index, &ring.kick)?;
    frontend.set_vring_enable(index, true)?;
    Ok(())
}
