//! Which memory is accepted.

use crate::vmm::{MEMORY, SIZE, Vmm, connect, memfd, region};
use crate::{Daemon, spec};
use daemon::limits::Overrides;
use daemon::registry::GuestSpec;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use std::fs::File;
use std::io::Write;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

/// Refused: the session ended, and the reason says this.
fn refused(daemon: &Daemon, frontend: Frontend, words: &str) {
    let reason = daemon.wait_disconnected();
    assert!(reason.contains(words), "{reason}");
    assert_eq!(daemon.registry.get("vm0").unwrap().last_error, Some(reason));
    drop(frontend);
}

#[test]
fn sealed_memory_is_accepted_and_told() {
    let daemon = Daemon::start();
    let frontend = connect(&daemon.add("vm0"));
    let file = memfd(0x20_0000, true);
    frontend
        .set_mem_table(&[region(&file, 0, 0x10_0000, 0), region(&file, 0x4000_0000, 0x10_0000, 0x10_0000)])
        .unwrap();
    daemon.guest("vm0");
    let status = daemon.registry.get("vm0").unwrap().status.unwrap();
    assert_eq!((status.memory_regions, status.memory_bytes), (2, 0x20_0000));
}

#[test]
fn unsealed_memory_is_refused() {
    let daemon = Daemon::start();
    let frontend = connect(&daemon.add("vm0"));
    let file = memfd(0x10_0000, false);
    assert!(frontend.set_mem_table(&[region(&file, 0, 0x10_0000, 0)]).is_err());
    refused(&daemon, frontend, "--allow-unsealed");
}

#[test]
fn unsealed_memory_is_accepted_where_that_is_allowed() {
    let daemon = Daemon::start_with(true);
    let frontend = connect(&daemon.add("vm0"));
    let file = memfd(0x10_0000, false);
    frontend.set_mem_table(&[region(&file, 0, 0x10_0000, 0)]).unwrap();
}

#[test]
fn region_beyond_its_file_is_refused() {
    for (allow_unsealed, bytes, offset) in
        [(false, 0x20_0000, 0), (false, 0x10_0000, 0x1000), (true, 0x4000_0000, 0)]
    {
        let daemon = Daemon::start_with(allow_unsealed);
        let frontend = connect(&daemon.add("vm0"));
        let file = memfd(0x10_0000, !allow_unsealed);
        assert!(frontend.set_mem_table(&[region(&file, 0, bytes, offset)]).is_err());
        daemon.wait_disconnected();
    }
}

#[test]
fn overlap_and_odd_regions_are_refused() {
    let file = memfd(0x20_0000, true);
    let tables = [
        vec![region(&file, 0, 0x10_0000, 0), region(&file, 0x8_0000, 0x10_0000, 0x10_0000)],
        vec![region(&file, 0x800, 0x1000, 0)],
        vec![region(&file, 0, 0x1800, 0)],
        vec![region(&file, 1 << 46, 0x1000, 0)],
    ];
    for table in tables {
        let daemon = Daemon::start();
        let frontend = connect(&daemon.add("vm0"));
        assert!(frontend.set_mem_table(&table).is_err());
        daemon.wait_disconnected();
    }
}

#[test]
fn too_many_regions_are_refused() {
    let daemon = Daemon::start();
    let mut frontend = connect(&daemon.add("vm0"));
    let file = memfd(0x1000 * 65, true);
    let mut added = 0;
    while added < 65 && frontend.add_mem_region(&region(&file, added << 20, 0x1000, added << 12)).is_ok() {
        added += 1;
    }
    assert_eq!(added, 64);
    refused(&daemon, frontend, "at most 64");
}

#[test]
fn file_that_is_no_memory_is_refused() {
    let daemon = Daemon::start_with(true);
    let frontend = connect(&daemon.add("vm0"));
    let file = File::options().read(true).write(true).open("/dev/zero").unwrap();
    assert!(frontend.set_mem_table(&[region(&file, 0, 0x10_0000, 0)]).is_err());
    daemon.wait_disconnected();
}

#[test]
fn region_that_stays_keeps_its_identity() {
    let daemon = Daemon::start();
    let mut frontend = connect(&daemon.add("vm0"));
    let file = memfd(0x20_0000, true);
    let (low, high) = (region(&file, 0, 0x10_0000, 0), region(&file, 0x4000_0000, 0x10_0000, 0x10_0000));
    let ids = || -> Vec<u64> {
        let table = daemon.guest("vm0").memory();
        table.regions().iter().map(|region| region.id()).collect()
    };
    frontend.set_mem_table(&[low]).unwrap();
    let first = ids();
    frontend.add_mem_region(&high).unwrap();
    assert_eq!(ids()[0], first[0]);
    let second = ids();
    frontend.set_mem_table(&[low, high]).unwrap();
    assert_eq!(ids(), second);
    frontend.remove_mem_region(&low).unwrap();
    assert_eq!(ids(), second[1..]);
    // The same memory at another offset is another region.
    frontend.set_mem_table(&[region(&file, 0x4000_0000, 0x10_0000, 0)]).unwrap();
    assert_ne!(ids(), second[1..]);
}

#[test]
fn rings_survive_a_new_table_and_rest_without_memory() {
    let daemon = Daemon::start();
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    vmm.send_memory();
    assert!(!vmm.command(&[0; 24]).is_empty());
    // A table without the rings' memory: the next kick finds no rings, and that is the end of that queue only.
    let file = memfd(0x1000, true);
    vmm.frontend.set_mem_table(&[region(&file, 1 << 32, 0x1000, 0)]).unwrap();
    vmm.corrupt_avail(0, 1);
    vmm.frontend.get_features().unwrap();
    assert!(daemon.registry.get("vm0").unwrap().connected);
}

const LOST: &str = "guest memory was lost under running work";

#[test]
fn truncated_rings_end_the_session_with_the_reason() {
    let daemon = Daemon::start_with(true);
    let socket = daemon.add("vm0");
    for _ in 0..2 {
        let mut vmm = Vmm::start_with(connect(&socket), memfd(MEMORY, false));
        assert!(!vmm.command(&[0; 24]).is_empty());
        vmm.file.set_len(0).unwrap();
        vmm.kick(0);
        refused(&daemon, vmm.frontend, LOST);
    }
}

#[test]
fn memory_truncated_before_its_first_use_ends_the_session_too() {
    let daemon = Daemon::start_with(true);
    let mut vmm = Vmm::start_with(connect(&daemon.add("vm0")), memfd(MEMORY, false));
    vmm.stop_rings();
    vmm.send_memory();
    vmm.file.set_len(0).unwrap();
    // The framework itself looks into the used ring. It may answer before the session has ended.
    vmm.frontend.set_vring_addr(0, &vmm.ring_addresses(0)).ok();
    refused(&daemon, vmm.frontend, LOST);
}

#[test]
fn truncation_that_nobody_touches_is_not_noticed() {
    let daemon = Daemon::start_with(true);
    let socket = daemon.path("vm0.sock");
    // Nobody looks at a ring that was left.
    let limits = Overrides::new([("busy_poll_us".to_owned(), 0)]).unwrap();
    assert!(daemon.registry.add(GuestSpec { limits, ..spec("vm0", &socket) }).unwrap());
    let mut vmm = Vmm::start_with(connect(&socket), memfd(MEMORY, false));
    vmm.file.set_len(MEMORY - 0x1000).unwrap();
    assert!(!vmm.command(&[0; 24]).is_empty());
    while daemon.registry.get("vm0").unwrap().queues[0].turns == 0 {
        std::thread::yield_now();
    }
    // All there again, and empty: the ring's index jumps.
    vmm.file.set_len(0).unwrap();
    vmm.file.set_len(MEMORY).unwrap();
    vmm.kick(0);
    vmm.frontend.get_features().unwrap();
    assert!(daemon.registry.get("vm0").unwrap().connected);
}

#[test]
fn punched_memory_reads_as_zeros() {
    let daemon = Daemon::start();
    let mut vmm = Vmm::start(&daemon.add("vm0"));
    assert!(!vmm.command(&[0; 24]).is_empty());
    // Everything but the rings. Seals against shrinking do not forbid it.
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&vmm.file, flags, 0x10_0000, MEMORY - 0x10_0000).unwrap();
    assert!(!vmm.command(&[0; 24]).is_empty());
    let guest = daemon.registry.get("vm0").unwrap();
    assert!(guest.connected && guest.last_error.is_none(), "{guest:?}");
}

/// What a file of /proc says after a name.
fn number(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn sealed_memory_of_an_empty_pool_of_huge_pages_ends_the_session() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(fd) = memfd_create("huge", flags) else {
        assert!(std::env::var_os("CI").is_none(), "this kernel has no huge pages, and CI is set");
        std::io::stderr().write_all(b"SKIPPED a test of huge pages: this kernel has none\n").unwrap();
        return;
    };
    let page = number("/proc/meminfo", "Hugepagesize:") << 10;
    let pool =
        number("/proc/meminfo", "HugePages_Free:") + number("/proc/sys/vm/nr_overcommit_hugepages", "");
    ftruncate(&fd, (pool + 1) * page).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let (daemon, file) = (Daemon::start(), File::from(fd));
    let frontend = connect(&daemon.add("vm0"));
    let memory = region(&file, 0, (pool + 1) * page, 0);
    frontend.set_mem_table(&[memory]).unwrap();
    for base in (0..=pool).map(|index| memory.userspace_addr + index * page) {
        let ring = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: base,
            avail_ring_addr: base + 0x1000,
            used_ring_addr: base + 0x2000,
            log_addr: None,
        };
        // The last of them finds no page; its answer may come all the same.
        frontend.set_vring_addr(0, &ring).ok();
    }
    refused(&daemon, frontend, LOST);
}
