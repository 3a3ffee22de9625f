//! What one guest can make this process hold at all limits at once, compared with the sum in daemon/DESIGN.md 7.
//!
//! In a process of its own, because that is what is measured. A sixteenth of the limits a guest has unless its operator
//! says otherwise; all of them: `SVM_SCALE=1 cargo test -p virtio-gpu-svm --test worst -- --nocapture`.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed step is a failed test, and the numbers are limits"
)]

use std::sync::Arc;
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::address_space::{Page, Run, Runs};
use virtio_gpu_svm::context::{Bind, Context, Launch};
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{Access, Asid, Device, Events, Fault, JobId, StopId};
use virtio_gpu_svm::gpu_vm::{Backing, GpuVa};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::timeline::Timeline;
use vm_memory::mmap::MmapRegion;
use zerocopy::IntoBytes;

const GPA_PAGE: u64 = 0x100;
const LEAF: u64 = 512;

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

fn scaled(scale: u32) -> Limits {
    let all = Limits::DEFAULT;
    let bytes = |n: u64| n / u64::from(scale);
    Limits {
        contexts: all.contexts / scale,
        resources: all.resources / scale,
        resource_bytes: bytes(all.resource_bytes),
        gpu_vms: all.gpu_vms / scale,
        total_mappings: all.total_mappings / scale,
        table_bytes: bytes(all.table_bytes),
        total_pending_faults: all.total_pending_faults / scale,
        total_jobs: all.total_jobs / scale,
        queue_bytes: bytes(all.queue_bytes),
        ..all
    }
}

/// The sum that DESIGN.md states.
fn stated(limits: &Limits) -> u64 {
    let times = |n: u32, bytes: u64| u64::from(n) * bytes;
    limits.table_bytes
        + limits.queue_bytes
        + limits.resource_bytes
        + times(limits.total_mappings, 200)
        + times(limits.total_jobs + limits.total_pending_faults, 700)
        + times(limits.contexts + limits.gpu_vms, 4096)
        + (16 << 20)
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn soft(index: usize) -> Arc<dyn Device> {
    SoftDevice::new(SoftConfig { index, name: format!("soft{index}"), ..SoftConfig::default() })
}

fn send(guest: &Arc<Guest>, command: &[u8]) {
    let mut response = Vec::new();
    guest.control(command, &mut response, 4096);
}

/// A context, and its GPU VMs with asid and device.
type Process = (Arc<Context>, Vec<(u32, Asid, usize)>);

/// Contexts with a GPU VM on each device, until there may be no more.
fn contexts(guest: &Arc<Guest>, limits: &Limits) -> Vec<Process> {
    let create = |ctx_id: u32| {
        let hdr =
            CtrlHdr { kind: VIRTIO_GPU_CMD_CTX_CREATE.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() };
        send(guest, CtxCreate { hdr, ..CtxCreate::default() }.as_bytes());
        let context = guest.context(ctx_id).unwrap();
        let vms = [0_usize, 1].map(|device| {
            let (vm_id, asid) = context.vm_create(device as u32, device).unwrap();
            (vm_id, asid, device)
        });
        (context, vms.to_vec())
    };
    (1..=limits.contexts).map(create).collect()
}

fn blobs(guest: &Arc<Guest>, limits: &Limits) {
    let entries = |count: u64| {
        (0..count).map(|n| MemEntry {
            addr: ((GPA_PAGE + 2 * (n % 64)) << 12).into(),
            length: 4096.into(),
            padding: 0.into(),
        })
    };
    let each = (limits.resource_bytes / u64::from(limits.resources) - 192) / 16;
    for id in 1..=limits.resources {
        let entries: Vec<MemEntry> = entries(each).collect();
        let hdr = CtrlHdr { kind: VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB.into(), ..CtrlHdr::default() };
        let blob = ResourceCreateBlob {
            hdr,
            resource_id: id.into(),
            blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
            nr_entries: (each as u32).into(),
            size: (each * 4096).into(),
            ..ResourceCreateBlob::default()
        };
        send(guest, &[blob.as_bytes(), entries.as_bytes()].concat());
    }
}

fn map(at: u64, pages: u64) -> Bind {
    let range = PageRange { start: at, end: at + pages };
    Bind::Map(GpuVa { range, backing: Backing::Userptr(at), readonly: false })
}

fn known(page: u64) -> Run {
    let first = Page { gpa_page: GPA_PAGE, readonly: false };
    Run { va: PageRange { start: page, end: page + 1 }, first, as_of: 0 }
}

/// Goes to each limit, in an order in which none stands in the way of another.
fn go_to_all_limits(host: &Arc<Host>, guest: &Arc<Guest>, limits: &Limits) {
    let room = |limit| guest.quota().room(limit);
    let all = contexts(guest, limits);
    blobs(guest, limits);
    let far = 1 << 30;
    // A window in each GPU VM, and one page in it that its tables lead to.
    for (context, vms) in &all {
        context.supply(Runs::new(std::iter::once(known(far)))).unwrap();
        for (vm_id, asid, device) in vms {
            context.bind(*vm_id, &[map(far, 1 << 24)]).unwrap();
            raise(host, *device, *asid, far);
        }
    }
    let mut next = 0;
    while room(Limit::TotalMappings) > 0 {
        let (context, vms) = &all[next % all.len()];
        let at = (next / all.len()) as u64 * 2;
        let ops: Vec<_> = (0..room(Limit::TotalMappings).min(64)).map(|n| map(at * 64 + 2 * n, 1)).collect();
        context.bind(vms[next % 2].0, &ops).unwrap();
        next += 1;
    }
    let mut faults = 0;
    while room(Limit::TotalPendingFaults) > 0 {
        let (_, vms) = &all[faults % all.len()];
        let (_, asid, device) = vms[0];
        raise(host, device, asid, far + (1 + (faults / all.len()) as u64) * LEAF * 4);
        faults += 1;
    }
    let (mut jobs, count) = (0, u64::from(limits.total_jobs));
    while room(Limit::TotalJobs) > 0 {
        let (context, vms) = &all[jobs % all.len()];
        let timeline = Timeline { vm_id: vms[0].0, ring_idx: 0 };
        let share = (room(Limit::QueueBytes) / room(Limit::TotalJobs).min(count)).saturating_sub(3000) / 64;
        let launch = Launch { timeline, user_data: 0, signal: 0, waits: Vec::new() };
        if context.exec(launch, vec![Packet::default(); share.clamp(1, 1024) as usize]).is_err() {
            break;
        }
        jobs += 1;
    }
    // One address space may not have as many leaves as there are bytes for.
    let leaves = all.iter().flat_map(|(context, _)| (1..60_000).map(move |leaf| (context, leaf * LEAF)));
    for (context, page) in leaves {
        if context.supply(Runs::new(std::iter::once(known(page)))).is_err() {
            break;
        }
    }
}

fn raise(host: &Arc<Host>, device: usize, asid: Asid, page: u64) {
    let fault = Fault {
        asid,
        stop: StopId(u64::MAX),
        job: JobId(0),
        addr: GpuAddr(page << 12),
        pages: 1,
        length_hint: 8,
        access: Access::Read,
        engine: 0,
        level: 0,
    };
    host.fault(device, fault);
}

#[test]
fn guest_at_all_limits_holds_no_more_than_is_stated() {
    let scale = std::env::var("SVM_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(16);
    let limits = scaled(scale);
    let host = Host::new(vec![soft(0), soft(1)]);
    let guest = host.open_guest("worst", limits, &[0, 1], Arc::new(Silent));
    let identity = RegionIdentity { inode: (0, 1), offset: 0, size: 8 << 20, gpa: GPA_PAGE << 12 };
    let region = Region::new(identity, MmapRegion::new(8 << 20).unwrap());
    guest.set_memory(Arc::new(MemoryTable::new(vec![region]).unwrap()));
    let before = resident_bytes();
    go_to_all_limits(&host, &guest, &limits);
    let held = resident_bytes().saturating_sub(before);
    for row in guest.status().limits {
        println!("{:22} {:>12} of {:>12}, refused {}", row.name, row.used, row.limit, row.refused);
        let per_guest = row.scope == "guest";
        assert!(!per_guest || row.used * 100 >= row.limit * 95, "{} is not reached: {row:?}", row.name);
    }
    let stated = stated(&limits);
    println!("1/{scale} of the limits: {held} bytes held, {stated} stated");
    assert!(held <= stated, "{held} bytes held, {stated} stated");
}
