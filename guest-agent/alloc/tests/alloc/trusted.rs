//! Processes that the operator trusts: what they pin by themselves is known to the agent, page by page.
//!
//! The device is played, so what is compared is where the agent says that a page is with what the kernel says.

use crate::lacking::{lacking, tested_in_qemu};
use crate::maps::{PAGE, assert_out_of_reach};
use crate::pinning;
use crate::program::{Program, as_wanted, compile, is_late, library, twice};
use crate::world::{Gpu, World};
use guest_agent::agent::AgentOptions;
use guest_agent::trust::Trust;
use std::fs::{File, Permissions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// An ordinary user, who runs nothing else: locked memory is counted for each user on the whole machine.
fn user() -> u32 {
    // In the range that user namespaces usually have.
    20_000 + std::process::id() % 40_000
}

/// An agent that trusts a user; `None`, and a word of it, where it could not look up anybody's pages.
fn trusting(uid: u32, what: &str) -> Option<World> {
    let refused = pinning::refusal();
    if rustix::process::geteuid().is_root() && refused.is_none() {
        let trust = Trust { uids: vec![uid], file: Some("trust.toml".into()) };
        return Some(World::with(AgentOptions { trust, ..AgentOptions::default() }));
    }
    let why = refused.map_or("needs root".to_owned(), |error| format!("io_uring: {error}"));
    lacking(&format!("{what} ({why})"));
    None
}

/// The page frame at an address of a process: the kernel's own word.
fn frame(pid: i32, address: u64) -> u64 {
    let mut entry = [0; 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    pagemap.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
    (u64::from_ne_bytes(entry) & ((1 << 55) - 1)) * PAGE
}

/// Where GPUs find pages, which is where the process has them.
fn pinned(gpu: &Gpu<'_>, pid: i32, base: u64, pages: Range<u64>) -> Vec<u64> {
    let found = pages.map(|page| {
        let address = base + page * PAGE;
        let told = gpu.physical(address).unwrap_or_else(|| panic!("page {page} is out of reach"));
        assert_eq!(told, frame(pid, address), "page {page}");
        assert_ne!(told, 0);
        told
    });
    found.collect()
}

#[test]
fn memory_of_a_trusted_process_is_pinned_where_it_stands() {
    assert_pinned(&[]);
}

#[test]
fn memory_that_comes_and_goes_by_number_is_pinned() {
    assert_pinned(&["numbered"]);
}

fn assert_pinned(arguments: &[&str]) {
    twice(|| {
        let Some(world) = trusting(0, "memory of a trusted process is pinned where it stands") else {
            return;
        };
        let mut program = Program::start(&world, "pinned", arguments);
        let pid = program.pid();
        let private = ["stack", "break", "high"].map(|name| program.told(name));
        let [_, broken, high] = private;
        let segment = program.told("segment");
        let gpu = world.gpu(pid);
        let before = private.map(|base| pinned(&gpu, pid, base, 0..4));
        let shared = pinned(&gpu, pid, segment, 0..4);
        // As the library says, and main's own frames lie in between.
        pinned(&gpu, pid, private[0] - (128 << 10), 0..32);
        match program.told("huge") {
            0 => tested_in_qemu(
                "huge pages (MAP_HUGETLB) of a trusted process (none is free: vm.nr_hugepages)",
                "qemu_every_kind_of_memory_works_or_says_why_not",
            ),
            huge => {
                pinned(&gpu, pid, huge, 0..512);
            }
        }
        let bytes = world.arena_bytes(pid);
        program.go_on();

        // The child writes to copies, and its parent's pages are where they were.
        let child = i32::try_from(program.told("child")).unwrap();
        let of_child = world.gpu(child);
        for (base, before) in private.into_iter().zip(&before) {
            let copies = pinned(&of_child, child, base, 0..4);
            assert!(copies.iter().all(|page| !before.contains(page)));
            assert_eq!(pinned(&world.gpu(pid), pid, base, 0..4), *before);
        }
        assert_eq!(pinned(&of_child, child, segment, 0..4), shared);
        program.go_on();
        program.told("parent");
        let gpu = world.gpu(pid);
        assert_eq!(private.map(|base| pinned(&gpu, pid, base, 0..4)), before);
        program.go_on();

        program.told("cleared");
        let gpu = world.gpu(pid);
        assert_eq!(pinned(&gpu, pid, broken, 0..4), before[1]);
        assert_eq!(pinned(&gpu, pid, segment, 0..4), shared);
        program.go_on();

        program.told("lower");
        let gpu = world.gpu(pid);
        pinned(&gpu, pid, broken, 0..2);
        assert_out_of_reach(&gpu, broken, 2..5);
        program.go_on();
        program.told("higher");
        pinned(&world.gpu(pid), pid, broken, 0..4);
        program.go_on();

        let moved = program.told("moved");
        program.told("detached");
        let gpu = world.gpu(pid);
        assert_out_of_reach(&gpu, high, 0..2);
        assert_eq!(gpu.word(high + 2 * PAGE), 777);
        assert_out_of_reach(&gpu, high, 3..4);
        pinned(&gpu, pid, moved, 0..3);
        assert_out_of_reach(&gpu, segment, 0..4);
        if !arguments.is_empty() {
            assert_out_of_reach(&gpu, broken, 1..4);
        }
        assert!(world.arena_bytes(pid) < bytes);
        program.go_on();
        program.end_well();
        world.assert_no_rings();
    });
}

/// Others have none of it, and hear nothing of it either.
#[test]
fn process_that_is_not_trusted_pins_nothing() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "pinned", &[]);
        let bases = ["stack", "break", "high", "segment"].map(|name| program.told(name));
        let gpu = world.gpu(program.pid());
        bases.into_iter().for_each(|base| assert_out_of_reach(&gpu, base, 0..4));
        program.told("huge");
        for step in ["child", "parent", "cleared", "lower", "higher", "moved"] {
            program.go_on();
            program.told(step);
        }
        program.told("detached");
        program.go_on();
        program.end_well();
    });
}

/// A guest's setting that forbids io_uring is named, once, and the program goes on. The program alone is forbidden it here,
/// by a filter of system calls: the setting is the whole machine's.
#[test]
fn guest_that_forbids_io_uring_is_told_which_setting_it_is() {
    twice(|| {
        let trust =
            Trust { uids: vec![rustix::process::geteuid().as_raw()], file: Some("trust.toml".into()) };
        let world = World::with(AgentOptions { trust, ..AgentOptions::default() });
        let folder = world.directory.path();
        let mut command = Command::new(compile(folder, "forbidden", &[]));
        command.arg("/usr/bin/env").arg(format!("LD_PRELOAD={}", library().display()));
        command.arg(compile(folder, "limited", &[])).env("SVM_AGENT_SOCKET", world.socket());
        let mut program = Program::spawn_plain(as_wanted(&mut command));
        let (few, many) = (program.told("few"), program.told("many"));
        let gpu = world.gpu(program.pid());
        assert_out_of_reach(&gpu, few, 0..1);
        assert_out_of_reach(&gpu, many, 0..4);
        program.go_on();
        let (status, said) = program.end();
        assert!(status.success() && said.lines().count() == 1, "{status}: {said}");
        assert!(
            said.contains("io_uring is not to be had (EPERM)") && said.contains("kernel.io_uring_disabled"),
            "{said}"
        );
    });
}

/// A user's own limit is named, once, and the program goes on.
#[test]
fn limit_of_locked_memory_is_named() {
    twice(|| {
        let Some(world) = trusting(user(), "limit of locked memory is named") else { return };
        let folder = world.directory.path();
        std::fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
        let program = compile(folder, "limited", &[]);
        let copy = folder.join("libsvm_alloc.so");
        std::fs::copy(library(), &copy).unwrap();
        let start = |limit: &str| {
            let mut command = Command::new("sh");
            // Without the library, or the shell would pin something itself.
            let with = format!("exec env LD_PRELOAD={} {}", copy.display(), program.display());
            command.arg("-c").arg(format!("ulimit -l {limit}; {with}"));
            command.uid(user()).gid(user()).env("SVM_AGENT_SOCKET", world.socket());
            Program::spawn_plain(as_wanted(&mut command))
        };
        for (limit, bytes) in [("64", "65536 bytes"), ("200", "204800 bytes")] {
            let mut program = start(limit);
            let (few, many) = (program.told("few"), program.told("many"));
            let pid = program.pid();
            let gpu = world.gpu(pid);
            // An io_uring is charged as well, and for a while after it is closed. What the break had before the program asked
            // is pinned at once, or not at all.
            if limit == "200" && !is_late() {
                pinned(&gpu, pid, few, 0..1);
            }
            assert_out_of_reach(&gpu, many, 0..4);
            program.go_on();
            let (status, said) = program.end();
            assert!(status.success(), "{status}: {said}");
            let words = ["RLIMIT_MEMLOCK", bytes, "ulimit -l", "limits.conf"];
            assert!(words.iter().all(|word| said.contains(word)) && said.lines().count() == 1, "{said}");
        }
        let mut program = start("4096");
        let many = ["few", "many"].map(|name| program.told(name))[1];
        pinned(&world.gpu(program.pid()), program.pid(), many, 0..256);
        program.go_on();
        program.end_well();
    });
}
