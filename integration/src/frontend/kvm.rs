//! A real vCPU between the guest's driver and the daemon: each doorbell is a store of guest code to a device address
//! (an ioeventfd, the queue's vhost-user kick), each interrupt is taken by guest code (an irqfd, the queue's call).
//!
//! Owns the KVM machine and the thread that runs its vCPU. The driver itself runs in this process on the same guest
//! memory; what it asks of the vCPU goes through a mailbox in guest memory (`boot`), and what the vCPU tells it comes
//! back as doorbells of its own, so that neither side polls.
//!
//! ```text
//!  driver --mailbox, order interrupt--> vCPU --store to doorbell q--> ioeventfd = kick --> svmd
//!  driver <--ioeventfd-- store to back-doorbell q <--handler-- vCPU <--irqfd = call-------- svmd
//! ```
//!
//! Guest code runs at user level in long mode; only the handlers and the idle wait are privileged. That much runs
//! natively also where /dev/kvm is of a paravirtual kind.

#![expect(unsafe_code, reason = "hands guest memory to KVM")]

mod boot;

use super::ram::{GuestRam, LOW_RESERVED};
use super::vmm::Wiring;
use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use virtio_gpu_svm::protocol::NUM_QUEUES;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First global system interrupt of ours; those below are the interrupt chips'.
const FIRST_GSI: u32 = 24;
/// Global system interrupt of the order interrupt.
const ORDER_GSI: u32 = FIRST_GSI + boot::QUEUES;
const _: () = assert!(boot::END <= LOW_RESERVED);
/// Where KVM may keep its task state segment: below 4 GiB, in nobody's way.
const KVM_TSS_ADDRESS: usize = 0xfffb_d000;
/// Where a message-signalled interrupt for the first local APIC is written to.
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// How long a vCPU may take to notice that it must end.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Whether this machine has a /dev/kvm that opens; if not, why. The only reason for which a KVM test may be skipped.
///
/// # Errors
/// What the kernel said.
pub fn available() -> Result<()> {
    Kvm::new().map(drop).context("/dev/kvm does not open")
}

/// How the vCPU's thread ended: nothing while it runs, then nothing wrong or what was wrong.
#[derive(Default)]
struct Ended {
    outcome: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
}

/// A machine of one vCPU that rings doorbells and takes interrupts.
pub struct KvmMachine {
    ram: Arc<GuestRam>,
    /// Queue q's doorbell: to be the vhost-user kick.
    kicks: Vec<EventFd>,
    /// Queue q's interrupt: to be the vhost-user call.
    calls: Vec<EventFd>,
    /// Written by the interrupt handler of queue q.
    wakes: Vec<EventFd>,
    /// Interrupts the vCPU to look at its mailbox.
    order: EventFd,
    /// Doorbells that the vCPU was asked to ring, by queue.
    requested: [AtomicU32; NUM_QUEUES],
    ended: Arc<Ended>,
    /// Keeps the machine alive; dropped after the vCPU.
    _vm: VmFd,
}

impl KvmMachine {
    /// Boots guest code in the first MiB of guest memory.
    ///
    /// # Errors
    /// KVM refused something.
    pub fn boot(ram: &Arc<GuestRam>) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm does not open")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        vm.set_tss_address(KVM_TSS_ADDRESS).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        add_memory(&vm, ram)?;
        let (kicks, calls, wakes, order) = wire_events(&vm)?;

        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        boot::load(ram)?;
        boot::set_registers(&vcpu)?;

        let ended = Arc::new(Ended::default());
        let alarms: Vec<EventFd> = wakes.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?;
        let report = ended.clone();
        std::thread::Builder::new().name("vcpu".into()).spawn(move || {
            let outcome = run(vcpu).map_err(|cause| format!("{cause:#}"));
            *report.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            report.changed.notify_all();
            // Whoever waits for an interrupt must learn that none will come; a full eventfd wakes them as well.
            for alarm in &alarms {
                alarm.write(1).ok();
            }
        })?;
        let requested = Default::default();
        Ok(Self { ram: ram.clone(), kicks, calls, wakes, order, requested, ended, _vm: vm })
    }

    /// Ends the vCPU and waits for it.
    ///
    /// # Errors
    /// It ended in another way than it was told to, or does not end.
    pub fn stop(&self) -> Result<()> {
        self.ram.store(boot::MAILBOX_STOP, 1_u32)?;
        self.order.write(1).context("cannot interrupt the vCPU")?;
        let outcome = self.ended.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let waited =
            self.ended.changed.wait_timeout_while(outcome, STOP_PATIENCE, |outcome| outcome.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            Some(Ok(())) => Ok(()),
            Some(Err(cause)) => bail!("the vCPU has ended: {cause}"),
            None => bail!("the vCPU does not end"),
        }
    }
}

impl Wiring for KvmMachine {
    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn calls(&self) -> &[EventFd] {
        &self.calls
    }

    fn wakes(&self) -> &[EventFd] {
        &self.wakes
    }

    fn ring(&self, queue: usize) -> Result<()> {
        let requested = self.requested.get(queue).with_context(|| format!("no queue {queue}"))?;
        self.check()?;
        // Two threads may store in either order: the vCPU rings whenever the value is not the one it saw last.
        let count = requested.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        self.ram.store(boot::MAILBOX_REQUESTED + 4 * queue as u64, count)?;
        self.order.write(1).context("cannot interrupt the vCPU")
    }

    fn check(&self) -> Result<()> {
        match &*self.ended.outcome.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(Ok(())) => bail!("the vCPU was stopped"),
            Some(Err(cause)) => bail!("the vCPU has ended: {cause}"),
        }
    }

    fn interrupts(&self, queue: usize) -> Result<u64> {
        ensure!(queue < NUM_QUEUES, "no queue {queue}");
        self.ram.load(boot::MAILBOX_INTERRUPTS + 8 * queue as u64)
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        if let Err(cause) = self.stop() {
            eprintln!("KVM machine: {cause:#}");
        }
    }
}

/// Gives the machine all of guest memory.
fn add_memory(vm: &VmFd, ram: &Arc<GuestRam>) -> Result<()> {
    for (slot, region) in ram.regions().iter().enumerate() {
        ensure!(
            region.gpa >= 1 << 32 || region.gpa + region.bytes <= u64::from(boot::DOORBELLS),
            "guest memory reaches into the addresses of devices"
        );
        let memory = kvm_userspace_memory_region {
            slot: u32::try_from(slot)?,
            flags: 0,
            guest_phys_addr: region.gpa,
            memory_size: region.bytes,
            userspace_addr: ram.host_base() + region.offset,
        };
        // SAFETY: the range is part of one mapping that GuestRam never unmaps or moves while it lives. The machine
        // holds an Arc of it and its vCPU ends before that is dropped; all other access to it is volatile.
        unsafe { vm.set_user_memory_region(memory) }.context("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

type Events = (Vec<EventFd>, Vec<EventFd>, Vec<EventFd>, EventFd);

/// Makes each queue's doorbells (both ways) and interrupts, and the order interrupt.
fn wire_events(vm: &VmFd) -> Result<Events> {
    let event = || EventFd::new(EFD_NONBLOCK).context("eventfd");
    let (mut kicks, mut calls, mut wakes) = (vec![], vec![], vec![]);
    let mut routes = vec![];
    for queue in 0..boot::QUEUES {
        let (kick, call, wake) = (event()?, event()?, event()?);
        for (fd, base) in [(&kick, boot::DOORBELLS), (&wake, boot::BACK_DOORBELLS)] {
            let address = IoEventAddress::Mmio(u64::from(base + queue * boot::DOORBELL_STRIDE));
            vm.register_ioevent(fd, &address, NoDatamatch).context("KVM_IOEVENTFD")?;
        }
        routes.push(message(FIRST_GSI + queue, boot::QUEUE_VECTOR + queue));
        kicks.push(kick);
        calls.push(call);
        wakes.push(wake);
    }
    routes.push(message(ORDER_GSI, boot::ORDER_VECTOR));
    let order = event()?;
    let table =
        KvmIrqRouting::from_entries(&routes).map_err(|e| anyhow::anyhow!("interrupt routes: {e:?}"))?;
    vm.set_gsi_routing(&table).context("KVM_SET_GSI_ROUTING")?;
    for (gsi, fd) in (FIRST_GSI..).zip(calls.iter().chain([&order])) {
        vm.register_irqfd(fd, gsi).context("KVM_IRQFD")?;
    }
    Ok((kicks, calls, wakes, order))
}

/// A route from an interrupt number to a message for the vCPU's local APIC.
fn message(gsi: u32, vector: u32) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi { address_lo: MSI_ADDRESS, data: vector, ..kvm_irq_routing_msi::default() };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

/// Runs the vCPU until guest code says that it was told to stop.
fn run(mut vcpu: VcpuFd) -> Result<()> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioWrite(address, _)) if address == u64::from(boot::STOP_DOORBELL) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let exit = format!("{exit:?}");
                let rip = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
                bail!("vCPU left guest code at {rip:#x}: {exit}")
            }
            // A signal for this thread, or a retry that KVM asks for.
            Err(cause) if is_retry(cause.errno()) => {}
            Err(cause) => return Err(cause).context("KVM_RUN"),
        }
    }
}

fn is_retry(errno: i32) -> bool {
    [rustix::io::Errno::INTR, rustix::io::Errno::AGAIN].iter().any(|e| e.raw_os_error() == errno)
}

#[cfg(test)]
mod tests;
