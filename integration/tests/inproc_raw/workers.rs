//! Workers of a hostmmu device inherit what the daemon has given up, and give up more.

use crate::{connect, ram};
use guest_agent::client::packet;
use integration::frontend::raw::{Record, userptr};
use integration::svmd::{DeviceKind, Options, Svmd};
use std::fs;
use virtio_gpu_svm::protocol::PAGE_SIZE;

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;

/// What the kernel says of each thread of processes that this one has started.
fn threads_of_children(parent: u32) -> Vec<String> {
    let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default();
    let child = format!("PPid:\t{parent}\n");
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let children = processes.filter(|process| read(process.join("status")).contains(&child));
    let tasks = children.flat_map(|process| fs::read_dir(process.join("task")).unwrap());
    tasks.map(|task| read(task.unwrap().path().join("status"))).collect()
}

#[test]
fn worker_at_a_fault_has_three_filters_and_no_capability() {
    let options = Options { devices: 1, kind: DeviceKind::Hostmmu, ..Options::default() };
    let daemon = Svmd::launch(&options).unwrap();
    let mut guest = connect(&daemon, "vm0", &ram(1));
    guest.create_context(1).unwrap();
    let vm = guest.create_vm(1, 0).unwrap();
    assert_eq!(guest.bind(vm, &[userptr(C, A, PAGE_SIZE)]).unwrap(), 0);
    guest.exec(vm, 0, 1, &[packet::fill(C, 8, 1)]).unwrap();
    guest.wait_record(|record| matches!(record, Record::Fault(_)).then_some(())).unwrap();

    let threads = threads_of_children(daemon.pid());
    assert_eq!(threads.len(), 2, "the worker's own and its ring's: {threads:?}");
    for status in threads {
        // Two of the daemon's, one of its own.
        for field in ["NoNewPrivs:\t1", "Seccomp:\t2", "Seccomp_filters:\t3", "CapEff:\t0000000000000000"] {
            assert!(status.contains(field), "{field} in {status}");
        }
    }
}
