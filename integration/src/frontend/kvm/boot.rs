//! What the vCPU finds in the first MiB of guest memory: page tables, descriptor tables, guest code, and the mailbox
//! through which this process and guest code talk.
//!
//! Addresses, all below 1 MiB and all identity mapped:
//! ```text
//! 0x01000 GDT   0x02000 IDT   0x03000 TSS        0x05000 end of the kernel stack   0x07000 end of the user stack
//! 0x08000 code  0x09000 mailbox                  0x10000 page tables (four pages)
//! ```
//! Guest code runs at user level: it looks for doorbells that it was asked to ring, rings them, and waits by an `int3`
//! into the idle routine, which halts until an interrupt unless there is something to do. Handlers of queue interrupts
//! count in the mailbox and ring the queue's back-doorbell.

use super::super::ram::GuestRam;
use anyhow::{Context, Result};
use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use virtio_gpu_svm::protocol::NUM_QUEUES;

/// Device addresses: queue q's doorbell.
pub const DOORBELLS: u32 = 0xd000_0000;
/// Device addresses: what the handler of queue q's interrupt rings.
pub const BACK_DOORBELLS: u32 = 0xd001_0000;
/// Device addresses: rung when guest code has been told to stop. Nothing listens, so it leaves to the VMM.
pub const STOP_DOORBELL: u32 = 0xd002_0000;
/// Bytes from one queue's doorbell to the next.
pub const DOORBELL_STRIDE: u32 = 0x1000;

/// Vector of queue q's interrupt, q added.
pub const QUEUE_VECTOR: u32 = 0x40;
/// Vector of the interrupt that only ends the idle wait.
pub const ORDER_VECTOR: u32 = 0x50;
/// Vector of the instruction by which guest code waits: `int3`, because a paravirtual KVM does not know `int n`.
const IDLE_VECTOR: u32 = 3;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const KERNEL_STACK_END: u64 = 0x5000;
const USER_STACK_END: u64 = 0x7000;
const CODE: u64 = 0x8000;
const MAILBOX: u64 = 0x9000;
const PAGE_TABLES: u64 = 0x10000;
/// First address that boot structures do not use.
pub const END: u64 = 0x14000;

/// u32 a queue: doorbells that guest code must have rung, counted by this process.
pub const MAILBOX_REQUESTED: u64 = MAILBOX;
/// u32 a queue: the same, as guest code has last seen it.
const MAILBOX_SERVED: u64 = MAILBOX + 0x40;
/// u64 a queue: interrupts taken.
pub const MAILBOX_INTERRUPTS: u64 = MAILBOX + 0x80;
/// u32: not 0 when guest code must stop.
pub const MAILBOX_STOP: u64 = MAILBOX + 0xc0;

/// Selectors of the GDT below.
const KERNEL_CODE: u16 = 0x08;
const USER_DATA: u16 = 0x18 | 3;
const USER_CODE: u16 = 0x20 | 3;
const TASK: u16 = 0x28;

// Guest code. Copied to CODE; every address in it is absolute or relative within it.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.svm_guest, "a"
    .balign 64
    .globl svm_guest_code
svm_guest_code:
    // User level: ring what was asked for.
2:  xor ecx, ecx
    xor ebx, ebx
3:  mov eax, dword ptr [{requested} + rbx * 4]
    cmp eax, dword ptr [{served} + rbx * 4]
    je 4f
    mov dword ptr [{served} + rbx * 4], eax
    mov edx, ebx
    imul edx, edx, {stride}
    add edx, {doorbells}
    mov dword ptr [rdx], ebx
    inc ecx
4:  inc ebx
    cmp ebx, {queues}
    jne 3b
    test ecx, ecx
    jnz 2b
    cmp dword ptr [{stop}], 0
    jne 5f
    int3
    jmp 2b
5:  mov edx, {stop_doorbell}
    mov dword ptr [rdx], ecx
    jmp 5b

    // Privileged, interrupts off: halt unless there is something to do. An interrupt cannot come between the look and
    // the halt, because `sti` takes effect after the instruction that follows it.
    .balign 64
    .globl svm_guest_idle
svm_guest_idle:
    push rax
    push rbx
    xor ebx, ebx
2:  mov eax, dword ptr [{requested} + rbx * 4]
    cmp eax, dword ptr [{served} + rbx * 4]
    jne 3f
    inc ebx
    cmp ebx, {queues}
    jne 2b
    cmp dword ptr [{stop}], 0
    jne 3f
    sti
    hlt
    cli
3:  pop rbx
    pop rax
    iretq

    // Privileged: an order has come; the idle routine's caller looks for it.
    .balign 64
    .globl svm_guest_order
svm_guest_order:
    push rax
    mov eax, {end_of_interrupt}
    mov dword ptr [rax], 0
    pop rax
    iretq

    // Privileged: an interrupt of a queue, one routine of 64 bytes a queue.
    .balign 64
    .globl svm_guest_queues
svm_guest_queues:
    .irp queue, 0, 1, 2
    .balign 64
    push rax
    inc qword ptr [{interrupts} + \queue * 8]
    mov eax, {back_doorbells} + \queue * {stride}
    mov dword ptr [rax], 0
    mov eax, {end_of_interrupt}
    mov dword ptr [rax], 0
    pop rax
    iretq
    .endr
    .balign 64
    .globl svm_guest_end
svm_guest_end:
    .popsection
    "#,
    requested = const MAILBOX_REQUESTED,
    served = const MAILBOX_SERVED,
    interrupts = const MAILBOX_INTERRUPTS,
    stop = const MAILBOX_STOP,
    doorbells = const DOORBELLS,
    back_doorbells = const BACK_DOORBELLS,
    stop_doorbell = const STOP_DOORBELL,
    stride = const DOORBELL_STRIDE,
    queues = const NUM_QUEUES,
    end_of_interrupt = const 0xfee0_00b0_u32,
);
/// Queues, and so handlers above.
pub const QUEUES: u32 = 3;
const _: () = assert!(NUM_QUEUES == 3);

unsafe extern "C" {
    static svm_guest_code: u8;
    static svm_guest_idle: u8;
    static svm_guest_order: u8;
    static svm_guest_queues: u8;
    static svm_guest_end: u8;
}

/// Bytes of a handler of a queue's interrupt.
const QUEUE_HANDLER_BYTES: u64 = 64;

/// The guest code's bytes, and where its routines begin in them.
struct Image {
    bytes: &'static [u8],
    idle: u64,
    order: u64,
    queues: u64,
}

fn image() -> Image {
    let start = &raw const svm_guest_code;
    let offset = |symbol: *const u8| symbol.addr() - start.addr();
    let len = offset(&raw const svm_guest_end);
    // SAFETY: both symbols stand in one section of read-only data, in this order, and all bytes between are
    // initialised by the assembler and never written.
    let bytes = unsafe { std::slice::from_raw_parts(start, len) };
    Image {
        bytes,
        idle: offset(&raw const svm_guest_idle) as u64,
        order: offset(&raw const svm_guest_order) as u64,
        queues: offset(&raw const svm_guest_queues) as u64,
    }
}

/// Writes everything that the vCPU needs into guest memory.
pub fn load(ram: &GuestRam) -> Result<()> {
    let image = image();
    ram.write(CODE, image.bytes)?;
    write_page_tables(ram)?;
    write_descriptors(ram)?;
    write_gate(ram, IDLE_VECTOR, CODE + image.idle, 3)?;
    write_gate(ram, ORDER_VECTOR, CODE + image.order, 0)?;
    for queue in 0..QUEUES {
        let handler = CODE + image.queues + QUEUE_HANDLER_BYTES * u64::from(queue);
        write_gate(ram, QUEUE_VECTOR + queue, handler, 0)?;
    }
    Ok(())
}

/// Identity maps the first GiB, and the fourth with its device addresses uncached. All of it is open to user level:
/// this guest has nothing to protect from itself.
fn write_page_tables(ram: &GuestRam) -> Result<()> {
    const OPEN: u64 = 0x07;
    const LARGE: u64 = 0x80;
    const UNCACHED: u64 = 0x10;
    let (pml4, pdpt) = (PAGE_TABLES, PAGE_TABLES + 0x1000);
    let (low, devices) = (PAGE_TABLES + 0x2000, PAGE_TABLES + 0x3000);
    ram.store(pml4, pdpt | OPEN)?;
    ram.store(pdpt, low | OPEN)?;
    ram.store(pdpt + 3 * 8, devices | OPEN)?;
    for entry in 0..512 {
        let page = entry << 21;
        ram.store(low + 8 * entry, page | LARGE | OPEN)?;
        ram.store(devices + 8 * entry, ((3 << 30) + page) | LARGE | UNCACHED | OPEN)?;
    }
    Ok(())
}

/// The GDT, and the task state that names the kernel stack.
fn write_descriptors(ram: &GuestRam) -> Result<()> {
    let task = 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56;
    let entries: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff, // kernel code
        0x00cf_9300_0000_ffff, // kernel data
        0x00cf_f300_0000_ffff, // user data
        0x00af_fb00_0000_ffff, // user code
        task,                  // two entries in long mode
        TSS >> 32,
    ];
    for (address, entry) in (GDT..).step_by(8).zip(entries) {
        ram.store(address, entry)?;
    }
    ram.write(TSS + 4, &KERNEL_STACK_END.to_le_bytes())
}

/// An interrupt gate: interrupts are off in the routine. `level` may call it by `int`.
fn write_gate(ram: &GuestRam, vector: u32, routine: u64, level: u64) -> Result<()> {
    let gate = IDT + 16 * u64::from(vector);
    let low = routine & 0xffff | u64::from(KERNEL_CODE) << 16;
    let high = 0x8e00 | level << 13 | (routine >> 16 & 0xffff) << 16;
    ram.store(gate, low | high << 32)?;
    ram.store(gate + 8, routine >> 32)
}

/// Puts the vCPU at the start of guest code, at user level in long mode, with its local APIC on.
pub fn set_registers(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 7 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = 0xfff;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= 0x620; // PAE, and SSE for whoever wants it
    sregs.cr0 = 0x8000_0033; // paging, protected mode, numeric errors
    sregs.efer |= 0x501; // long mode, on and active; syscall
    sregs.cs = code_or_data(USER_CODE, 11, true);
    let data = code_or_data(USER_DATA, 3, false);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr =
        kvm_segment { base: TSS, limit: 0x67, selector: TASK, type_: 11, present: 1, ..Default::default() };
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;

    let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    regs.rip = CODE;
    regs.rsp = USER_STACK_END;
    regs.rflags = 0x202; // interrupts on
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;

    const SPURIOUS_VECTOR: usize = 0xf0;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    lapic.regs[SPURIOUS_VECTOR] = -1; // vector 0xff
    lapic.regs[SPURIOUS_VECTOR + 1] = 1; // enabled
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}

fn code_or_data(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
