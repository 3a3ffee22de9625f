//! Pins on this kernel; they need root, io_uring and a pagemap, and say so where one lacks: with CI set that fails.

use super::*;
use crate::lacking::{lacking, tested_in_qemu};
use crate::pinning;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::sync::mpsc;
use std::time::Duration;

/// Where page frame numbers are hidden, or the kernel lets nobody pin, nothing can be pinned: that is said, and no more
/// can be asked for.
fn pin_or_say_why_not(what: &str, len: usize) -> Option<Pinned> {
    let why = match (pinning::refusal(), KernelPinner.pin(len)) {
        (Some(error), _) => format!("io_uring: {error}"),
        (None, Ok(pinned)) => return Some(pinned),
        (None, Err(Error::Hidden)) if !sees_frames() => "needs CAP_SYS_ADMIN".to_owned(),
        (None, Err(other)) => panic!("{other}: {other:?}"),
    };
    lacking(&format!("{what} ({why})"));
    None
}

/// CAP_SYS_ADMIN, and not only in a user namespace.
fn sees_frames() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
    let users = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    let first = users.split_whitespace().eq(["0", "0", "4294967295"]);
    first && mask & 1 << CAP_SYS_ADMIN != 0
}

/// A second lookup, through another mapping, finds the same pages, all distinct.
#[test]
fn pages_are_looked_up_after_the_pin() {
    let Some(pinned) = pin_or_say_why_not("pages are looked up after the pin", 64 * PAGE_BYTES) else {
        return;
    };
    let mut pages = pinned.pages.clone();
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages.len(), 64);
    let again = SharedMapping::new(pinned.fd.as_fd(), 0, 64 * PAGE_BYTES, Placement::Anywhere).unwrap();
    again.populate(0, 64 * PAGE_BYTES).unwrap();
    assert_eq!(look_up_mapping(&again), pinned.pages);
}

#[test]
fn the_file_can_neither_shrink_nor_grow() {
    let fd = sealed_memfd(2 * PAGE_BYTES).unwrap();
    for len in [PAGE_BYTES as u64, 3 * PAGE_BYTES as u64] {
        assert_eq!(rustix::fs::ftruncate(&fd, len), Err(rustix::io::Errno::PERM));
    }
}

/// The process that the file is for writes through it, so this seal must not be there.
#[test]
fn the_file_can_be_mapped_writable_later() {
    let fd = sealed_memfd(PAGE_BYTES).unwrap();
    let seals = rustix::fs::fcntl_get_seals(&fd).unwrap();
    assert_eq!(seals, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
    SharedMapping::new(fd.as_fd(), 0, PAGE_BYTES, Placement::Anywhere).unwrap();
}

// Files of processes.

const PAGES: usize = 64;
const LEN: usize = PAGES * PAGE_BYTES;

fn can_pin(what: &str) -> bool {
    pin_or_say_why_not(what, PAGE_BYTES).is_some()
}

/// A file as a process makes it, `LEN` bytes of which no page is there yet.
fn own_file() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("own", flags).unwrap());
    file.set_len(LEN as u64).unwrap();
    file
}

fn punch(file: &File, first_page: usize, pages: usize) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (offset, len) = (first_page * PAGE_BYTES, pages * PAGE_BYTES);
    rustix::fs::fallocate(file, flags, offset as u64, len as u64).unwrap();
}

/// Where the file's pages are now, as another mapping sees them.
fn pages_of(file: &File) -> Vec<u64> {
    let mapping = SharedMapping::new(file.as_fd(), 0, LEN, Placement::Anywhere).unwrap();
    mapping.populate(0, LEN).unwrap();
    look_up_mapping(&mapping)
}

fn look_up_mapping(mapping: &SharedMapping) -> Vec<u64> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    look_up(&pagemap, mapping.address() as u64, mapping.len() / PAGE_BYTES).unwrap()
}

/// Imports all of a file of `LEN` bytes, in slices of `slice`.
fn import(file: &File, slice: usize, after: &mut dyn FnMut(Step)) -> Result<Held> {
    let mut pinning = KernelPinning::in_slices(file.as_fd(), 0, LEN, slice)?;
    while !pinning.pin_slice(after)? {}
    Ok(pinning.held())
}

fn import_at_once(file: &File, offset: usize, len: usize) -> Result<Held> {
    KernelPinner.import(file.as_fd(), offset as u64, len).and_then(finish)
}

#[test]
fn file_of_a_process_is_pinned_with_what_is_in_it() {
    if !can_pin("file of a process is pinned with what is in it") {
        return;
    }
    let file = own_file();
    file.write_all_at(b"kept", 5 * PAGE_BYTES as u64).unwrap();
    let whole = import_at_once(&file, 0, LEN).unwrap();
    // The same file for another process, and a part of it: the same pages.
    let again = import_at_once(&file, 0, LEN).unwrap();
    let part = import_at_once(&file, 4 * PAGE_BYTES, 8 * PAGE_BYTES).unwrap();
    assert_eq!((&whole.pages, &again.pages), (&pages_of(&file), &pages_of(&file)));
    assert_eq!(part.pages, whole.pages[4..12]);
    let mut bytes = [1; 5];
    file.read_exact_at(&mut bytes, 5 * PAGE_BYTES as u64).unwrap();
    assert_eq!(&bytes, b"kept\0");
}

/// The file is changed after each step, once or each time: what comes out is an error, or pages that are the file's.
#[test]
fn file_that_changes_while_it_is_pinned_is_refused_or_pinned_anew() {
    if !can_pin("file that changes while it is pinned is refused or pinned anew") {
        return;
    }
    type Change = fn(&File);
    let cut: Change = |file| file.set_len(LEN as u64 / 2).unwrap();
    let cut_to_nothing: Change = |file| file.set_len(0).unwrap();
    let cut_and_grown: Change = |file| {
        file.set_len(0).unwrap();
        file.set_len(LEN as u64).unwrap();
    };
    let hole: Change = |file| punch(file, 7, 3);
    let replaced: Change = |file| {
        punch(file, 0, PAGES);
        file.write_all_at(&vec![7; LEN], 0).unwrap();
    };
    let all = u32::MAX;
    for (name, change, step, times, expected) in [
        ("cut", cut, Step::Populated, 1, Err(Errno::FAULT)),
        ("cut", cut, Step::Pinned, 1, Err(Errno::FAULT)),
        ("cut to nothing", cut_to_nothing, Step::Populated, 1, Err(Errno::FAULT)),
        ("cut to nothing", cut_to_nothing, Step::Pinned, 1, Err(Errno::FAULT)),
        ("cut and grown", cut_and_grown, Step::Populated, all, Ok(1)),
        ("cut and grown", cut_and_grown, Step::Pinned, 2, Ok(3)),
        ("cut and grown", cut_and_grown, Step::Pinned, all, Err(Errno::AGAIN)),
        ("hole", hole, Step::Populated, all, Ok(1)),
        ("hole", hole, Step::Pinned, 1, Ok(2)),
        ("hole", hole, Step::Pinned, all, Err(Errno::AGAIN)),
        ("replaced", replaced, Step::Populated, all, Ok(1)),
        ("replaced", replaced, Step::Pinned, 3, Ok(4)),
        ("replaced", replaced, Step::Pinned, all, Err(Errno::AGAIN)),
    ] {
        let what = format!("{name} after {step:?}, {times} times");
        let file = own_file();
        let (mut changes, mut attempts) = (0, 0);
        let held = import(&file, LEN, &mut |done| {
            attempts += u32::from(done == Step::Populated);
            if done == step && changes < times {
                changes += 1;
                change(&file);
            }
        });
        match (held, expected) {
            (Ok(held), Ok(expected)) => {
                assert_eq!(attempts, expected, "{what}");
                assert_eq!(held.pages, pages_of(&file), "{what}");
            }
            (Err(error), Err(expected)) => assert_eq!(error.errno(), expected, "{what}: {error}"),
            (held, expected) => panic!("{what}: {:?}, not {expected:?}", held.map(|held| held.pages)),
        }
        assert!(attempts <= MAX_ATTEMPTS, "{what}");
    }
}

/// What happens to a slice that is pinned already does not matter: its pages are held, and no others are told.
#[test]
fn slice_that_changes_after_its_turn_stays_as_it_was_pinned() {
    if !can_pin("a slice that changes after its turn stays as it was pinned") {
        return;
    }
    const SLICE: usize = LEN / 4;
    let file = own_file();
    let mut pinning = KernelPinning::in_slices(file.as_fd(), 0, LEN, SLICE).unwrap();
    assert!(!pinning.pin_slice(&mut |_| {}).unwrap());
    let first = pages_of(&file)[..PAGES / 4].to_vec();
    punch(&file, 0, PAGES / 4);
    file.write_all_at(&vec![7; LEN], 0).unwrap();
    for turn in 1..3 {
        assert!(!pinning.pin_slice(&mut |_| {}).unwrap(), "slice {turn}");
    }
    assert!(pinning.pin_slice(&mut |_| {}).unwrap());
    let held = pinning.held();
    let now = pages_of(&file);
    assert_eq!((&held.pages[..PAGES / 4], &held.pages[PAGES / 4..]), (&first[..], &now[PAGES / 4..]));
    drop(file);
    let others = pages_given_out();
    assert!(held.pages.iter().all(|page| !others.contains(page)), "pinned pages are given to others");
}

/// Only the slice that lost a page is pinned again.
#[test]
fn slice_that_loses_a_page_is_pinned_again_alone() {
    if !can_pin("a slice that loses a page is pinned again alone") {
        return;
    }
    let file = own_file();
    let (mut changes, mut turns) = (0, 0);
    let held = import(&file, LEN / 4, &mut |done| {
        turns += u32::from(done == Step::Populated);
        // In the second and in the last slice.
        if done == Step::Pinned && [(0, 2), (1, 5)].contains(&(changes, turns)) {
            punch(&file, if changes == 0 { PAGES / 4 } else { PAGES - 1 }, 1);
            changes += 1;
        }
    });
    assert_eq!((changes, turns), (2, 6));
    assert_eq!(held.unwrap().pages, pages_of(&file));
}

#[test]
fn large_memory_has_as_many_slices_as_the_kernel_takes() {
    for (len, slice) in [(PAGE_BYTES, SLICE), (SLICE * MAX_SLICES, SLICE), (40 << 30, 3 * SLICE)] {
        assert_eq!(slice_of(len), slice, "{len:#x}");
        assert!(len.div_ceil(slice) <= MAX_SLICES);
    }
}

/// Who may not write to a file cannot have a GPU do it; and what a GPU may write to cannot be sealed any more.
#[test]
fn sealed_file_is_refused() {
    if !can_pin("sealed file is refused") {
        return;
    }
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let file = own_file();
        rustix::fs::fcntl_add_seals(&file, seal).unwrap();
        let refused = import_at_once(&file, 0, LEN).map(|held| held.pages);
        assert_eq!(refused.unwrap_err().errno(), Errno::PERM, "{seal:?}");
    }
    let file = own_file();
    let held = import_at_once(&file, 0, LEN).unwrap();
    assert_eq!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE), Err(Errno::BUSY));
    drop(held);
}

/// Pages that the kernel has given to others, had they been free.
fn pages_given_out() -> std::collections::HashSet<u64> {
    let files: Vec<File> = (0..512).map(|_| own_file()).collect();
    files.iter().flat_map(pages_of).collect()
}

/// While another thread cuts, punches and fills the file, whatever is pinned stays pinned, even when the file is gone.
#[test]
fn pages_of_a_file_that_is_being_changed_are_nobody_elses() {
    if !can_pin("pages of a file that is being changed are nobody else's") {
        return;
    }
    let seed = std::env::var("SVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random: u64 = seed.unwrap_or_else(crate::driver::new_incarnation) | 1;
    println!("SVM_TEST_SEED={random}");
    let mut below = move |bound: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % bound as u64).unwrap()
    };
    let file = own_file();
    let mut held = Vec::new();
    let mut slices = [LEN, LEN / 4, PAGE_BYTES].into_iter().cycle();
    let (begun, beginning) = mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        // One change for each import, somewhere in it.
        scope.spawn(|| {
            for () in beginning {
                let (first, late) = (below(PAGES), below(400));
                std::thread::sleep(Duration::from_micros(late as u64));
                match below(8) {
                    0 => {
                        file.set_len((first * PAGE_BYTES) as u64).unwrap();
                        file.set_len(LEN as u64).unwrap();
                    }
                    1..4 => punch(&file, first, 1 + below(PAGES - first)),
                    _ => {
                        punch(&file, 0, PAGES);
                        file.write_all_at(&vec![9; LEN], 0).unwrap();
                    }
                }
            }
        });
        for _ in 0..300 {
            begun.send(()).unwrap();
            // Long steps, for the other thread to come in between.
            let after = &mut |_| std::thread::sleep(Duration::from_micros(50));
            match import(&file, slices.next().unwrap(), after) {
                Ok(pinned) => held.push(pinned),
                Err(error) => {
                    assert!(matches!(error.errno(), Errno::AGAIN | Errno::FAULT), "{error}");
                }
            }
        }
        drop(begun);
    });
    assert!(held.len() > 100, "only {} imports were done", held.len());
    drop(file);
    let others = pages_given_out();
    let ours: Vec<u64> = held.iter().flat_map(|held| held.pages.iter().copied()).collect();
    let shared = ours.iter().filter(|page| others.contains(page)).count();
    assert_eq!(shared, 0, "of {} pages", ours.len());
}

#[test]
fn huge_pages_of_a_process_are_pinned_page_by_page() {
    const WHAT: &str = "huge pages of a process are pinned page by page";
    if !can_pin(WHAT) {
        return;
    }
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok()).unwrap_or(0)
    };
    if field("HugePages_Free:") == 0 {
        let why = format!("{WHAT} (no huge page is free: vm.nr_hugepages)");
        tested_in_qemu(&why, "qemu_every_kind_of_memory_works_or_says_why_not");
        return;
    }
    let huge = field("Hugepagesize:") << 10;
    let file = rustix::fs::memfd_create("own", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
    rustix::fs::ftruncate(&file, huge as u64).unwrap();
    let held = import_at_once(&file.into(), 0, huge).unwrap();
    assert_eq!(held.pages.len(), huge / PAGE_BYTES);
    let first = held.pages[0];
    assert!(first.is_multiple_of(huge as u64), "{first:#x}");
    assert!((0..).zip(&held.pages).all(|(n, page)| *page == first + n * PAGE_BYTES as u64));
}
