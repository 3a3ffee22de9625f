//! The vCPU alone: doorbells out, interrupts in.

use super::super::ram::Layout;
use super::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io::Write;
use std::os::fd::BorrowedFd;

/// A machine, or a word on the real stderr why there is none.
fn machine() -> Option<KvmMachine> {
    if let Err(cause) = available() {
        std::io::stderr().write_all(format!("SKIPPED a KVM test: {cause:#}\n").as_bytes()).unwrap();
        return None;
    }
    let ram = GuestRam::new(Layout::Flat { bytes: 32 << 20 }, 1).unwrap();
    Some(KvmMachine::boot(&ram).unwrap())
}

fn wait(event: &EventFd) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: the eventfd outlives this call.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap() == 1
}

#[test]
fn kvm_doorbells_reach_their_queue() {
    let Some(machine) = machine() else { return };
    for round in 0..200 {
        let queue = round % NUM_QUEUES;
        machine.ring(queue).unwrap();
        assert!(wait(&machine.kicks()[queue]), "round {round}: {:?}", machine.check());
        machine.kicks()[queue].read().unwrap();
    }
    machine.stop().unwrap();
}

#[test]
fn kvm_interrupts_are_taken_by_guest_code() {
    let Some(machine) = machine() else { return };
    for round in 0..200 {
        let queue = round % NUM_QUEUES;
        machine.calls()[queue].write(1).unwrap();
        assert!(wait(&machine.wakes()[queue]), "round {round}: {:?}", machine.check());
        machine.wakes()[queue].read().unwrap();
    }
    assert_eq!(machine.interrupts(1).unwrap(), 67);
    machine.stop().unwrap();
}
