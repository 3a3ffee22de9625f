use super::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

const PAGE: usize = 4096;
/// Set in a process that is to die; its value says how.
const DOOM: &str = "SVMD_TEST_DOOM";

fn memfd(pages: usize) -> Arc<File> {
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, (pages * PAGE) as u64).unwrap();
    Arc::new(File::from(fd))
}

fn map(file: &Arc<File>) -> MmapRegion<()> {
    let bytes = usize::try_from(file.metadata().unwrap().len()).unwrap();
    MmapRegion::from_file(FileOffset::from_arc(Arc::clone(file), 0), bytes).unwrap()
}

fn region(file: &Arc<File>, gpa: u64, loss: &Arc<Loss>) -> Arc<Region> {
    let size = file.metadata().unwrap().len();
    watch_region(RegionIdentity { inode: (1, 1), offset: 0, size, gpa }, map(file), loss).unwrap()
}

fn loss() -> Arc<Loss> {
    Loss::new(Arc::new(Waker::new().unwrap()))
}

fn read(mapping: &MmapRegion<()>, page: usize) -> u64 {
    mapping.as_volatile_slice().read_obj(page * PAGE).unwrap()
}

fn write(mapping: &MmapRegion<()>, page: usize, word: u64) {
    mapping.as_volatile_slice().write_obj(word, page * PAGE).unwrap();
}

fn is_set(waker: &Waker) -> bool {
    rustix::io::read(waker, &mut [0; 8]).is_ok()
}

fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

#[test]
fn lost_memory_holds_zeros_and_its_session_is_told_once() {
    let (file, other_file) = (memfd(4), memfd(4));
    let (mine, other) = (loss(), loss());
    let (lost, kept) = (region(&file, 0x1000_0000, &mine), region(&other_file, 0x1000_0000, &other));
    (0..4).for_each(|page| write(lost.mapping(), page, 7));
    (0..4).for_each(|page| write(kept.mapping(), page, 8));

    file.set_len(PAGE as u64).unwrap();
    assert_eq!(read(lost.mapping(), 2), 0);
    assert_eq!(mine.found(), Some((0x1000_0000, Some(this_thread()))));
    assert!(is_set(&mine.waker));

    // All of it is private now, also what the file still has.
    (0..4).for_each(|page| assert_eq!(read(lost.mapping(), page), 0));
    write(lost.mapping(), 0, 9);
    assert_eq!(read(&map(&file), 0), 7);
    assert!(!is_set(&mine.waker), "told twice");

    assert_eq!(other.found(), None);
    (0..4).for_each(|page| assert_eq!(read(kept.mapping(), page), 8));
}

#[test]
fn stores_and_copies_into_lost_memory_come_to_their_end() {
    let (file, mine) = (memfd(4), loss());
    let lost = region(&file, 0, &mine);
    file.set_len(0).unwrap();
    lost.mapping().as_volatile_slice().write_slice(&[5; 4 * PAGE], 0).unwrap();
    assert_eq!(read(lost.mapping(), 3), 0x0505_0505_0505_0505);
    assert!(mine.found().is_some());
}

#[test]
fn memory_of_rings_is_watched_too() {
    let (file, mine) = (memfd(4), loss());
    let offset = FileOffset::from_arc(Arc::clone(&file), 0);
    let ranges = [(vm_memory::GuestAddress(0x4000), 4 * PAGE, Some(offset))];
    let rings =
        WatchedMap::new(Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()), &mine).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(rings.map().read_obj::<u64>(vm_memory::GuestAddress(0x5000)).unwrap(), 0);
    assert_eq!(mine.found(), Some((0x4000, Some(this_thread()))));
}

#[test]
fn loss_that_a_device_reports_is_told_without_a_thread() {
    let mine = loss();
    region(&memfd(1), 0x8000, &mine).report_lost();
    assert_eq!(mine.found(), Some((0x8000, None)));
    assert!(is_set(&mine.waker));
}

#[test]
fn mapping_is_in_the_table_as_long_as_it_is_mapped() {
    let (file, mine) = (memfd(1), loss());
    // More than a block of the table has.
    let regions: Vec<_> = (0..2 * BLOCK as u64 + 1).map(|gpa| region(&file, gpa << 12, &mine)).collect();
    let mut gone = vec![];
    for region in regions {
        let start = region.mapping().as_ptr().addr();
        for (addr, gpa) in [(start, Some(region.gpa().0)), (start + PAGE - 1, Some(region.gpa().0))] {
            assert_eq!(lookup(addr).map(|entry| entry.gpa), gpa);
        }
        gone.push((Arc::downgrade(&region), start));
    }
    assert_eq!(Arc::strong_count(&mine), 1, "a guard is left");
    // Others of these tests may have taken the addresses meanwhile, but not for this session.
    let ours =
        |start: usize| lookup(start).is_some_and(|entry| entry.loss.cast_const() == Arc::as_ptr(&mine));
    assert!(gone.iter().all(|(region, start)| region.upgrade().is_none() && !ours(*start)));
}

#[test]
fn each_session_hears_of_its_own_while_others_come_and_go() {
    let session = |number: u64| {
        for round in 0..400 {
            let (file, mine) = (memfd(2), loss());
            let lost = region(&file, number << 32 | round << 12, &mine);
            write(lost.mapping(), 1, 1);
            assert_eq!((read(lost.mapping(), 1), mine.found()), (1, None));
            file.set_len(0).unwrap();
            assert_eq!(read(lost.mapping(), 1), 0);
            assert_eq!(mine.found(), Some((lost.gpa().0, Some(this_thread()))));
        }
    };
    std::thread::scope(|scope| {
        (1..=4).for_each(|number| drop(scope.spawn(move || session(number))));
    });
}

/// Runs the named test in a process of its own that is to die; the signal that ended it.
fn signal_of_doom(test: &str, doom: &str) -> Option<i32> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("sigbus::tests::{test}"), "--nocapture"]).env(DOOM, doom);
    child.output().unwrap().status.signal()
}

/// With a handler, and a mapping that it watches. Who does not die is killed, by another signal, when it has used seconds.
fn prepare_to_die() -> Arc<Region> {
    for (resource, most) in [(Resource::Core, 0), (Resource::Cpu, 5)] {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).unwrap();
    }
    region(&memfd(1), 0, &loss())
}

#[test]
fn sigbus_outside_guest_memory_ends_the_process_by_it() {
    if std::env::var_os(DOOM).is_none() {
        let test = "sigbus_outside_guest_memory_ends_the_process_by_it";
        assert_eq!(signal_of_doom(test, "touch"), Some(libc::SIGBUS));
        return;
    }
    let watched = prepare_to_die();
    let file = memfd(2);
    let unwatched = map(&file);
    file.set_len(0).unwrap();
    println!("read {} beyond the end of a file", read(&unwatched, 1));
    drop(watched);
}

#[test]
fn sigbus_that_was_sent_ends_the_process_by_it() {
    if std::env::var_os(DOOM).is_none() {
        assert_eq!(signal_of_doom("sigbus_that_was_sent_ends_the_process_by_it", "sent"), Some(libc::SIGBUS));
        return;
    }
    let watched = prepare_to_die();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::BUS).unwrap();
    // Another thread may get it.
    std::thread::sleep(std::time::Duration::from_secs(60));
    drop(watched);
}
