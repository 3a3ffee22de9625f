//! mmap and its relatives. GPUs reach what a program maps by itself, and nothing that was there before.

use crate::mock::eventually;
use crate::program::{Program, is_late, twice};
use crate::world::{Gpu, World};
use guest_agent::agent::AgentOptions;
use std::ops::Range;

pub const PAGE: u64 = 4096;

/// Whether the first words of pages are `value`, `value` + 1 and so on, counted from `base`.
pub fn assert_words(gpu: &Gpu<'_>, base: u64, pages: Range<u64>, value: u64) {
    for page in pages {
        assert_eq!(gpu.word(base + page * PAGE), value + page, "page {page}");
    }
}

pub fn add_to_words(gpu: &Gpu<'_>, base: u64, pages: Range<u64>, more: u64) {
    for page in pages {
        let at = base + page * PAGE;
        gpu.set_word(at, gpu.word(at) + more);
    }
}

pub fn assert_out_of_reach(gpu: &Gpu<'_>, base: u64, pages: Range<u64>) {
    for page in pages {
        assert!(!gpu.reaches(base + page * PAGE), "page {page}");
    }
}

#[test]
fn mappings_of_the_program_are_reached() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "mapped", &[world.directory.path().to_str().unwrap()]);
        let bases = [(); 3].map(|()| program.told("reached"));
        let gpu = world.gpu(program.pid());
        for (value, base) in (0..).step_by(100).zip(bases) {
            assert_words(&gpu, base, 0..5, value);
            add_to_words(&gpu, base, 0..5, 1_000_000);
        }
        program.go_on();

        program.told("unmapped");
        let gpu = world.gpu(program.pid());
        for base in bases {
            assert_out_of_reach(&gpu, base, 0..5);
        }
        program.go_on();

        let file = program.told("file");
        let gpu = world.gpu(program.pid());
        assert_words(&gpu, file, 0..4, 301);
        assert_out_of_reach(&gpu, file, 4..5);
        add_to_words(&gpu, file, 0..4, 1_000_000);
        program.go_on();

        let before = program.told("none");
        let mut left: Vec<u64> = (0..5).map(|_| program.told("left")).collect();
        assert_eq!(program.told("none"), before);
        left.extend((0..3).map(|_| program.told("left")));
        assert_eq!(program.told("three"), before + 3);
        let gpu = world.gpu(program.pid());
        for base in left {
            assert_out_of_reach(&gpu, base, 0..5);
        }
        program.go_on();
        program.end_well();
    });
}

#[test]
fn parts_of_a_mapping_go_and_others_take_their_place() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "holes", &[]);
        let base = program.told("base");
        let pid = program.pid();
        let bytes = world.arena_bytes(pid);
        assert_words(&world.gpu(pid), base, 0..20, 100);
        program.go_on();

        program.told("cut");
        let gpu = world.gpu(pid);
        for kept in [1..4, 9..19] {
            assert_words(&gpu, base, kept.clone(), 100);
            add_to_words(&gpu, base, kept, 1000);
        }
        for gone in [0..1, 4..9, 19..20] {
            assert_out_of_reach(&gpu, base, gone);
        }
        program.go_on();

        program.told("mapped");
        let gpu = world.gpu(pid);
        for (new, value) in [(5..7, 200), (10..14, 300)] {
            assert_words(&gpu, base, new.clone(), value);
            add_to_words(&gpu, base, new, 1000);
        }
        for kept in [1..4, 9..10, 14..16, 17..19] {
            assert_words(&gpu, base, kept, 1100);
        }
        assert_out_of_reach(&gpu, base, 16..17);
        program.go_on();

        program.told("gone");
        assert_out_of_reach(&world.gpu(pid), base, 0..20);
        eventually("all of it is given back", || world.arena_bytes(pid) == bytes - 20 * PAGE);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn mappings_that_change_size_and_place_take_their_contents_along() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "resized", &[]);
        let pid = program.pid();
        let base = program.told("shrunk");
        let gpu = world.gpu(pid);
        assert_words(&gpu, base, 0..6, 100);
        assert_out_of_reach(&gpu, base, 6..10);
        add_to_words(&gpu, base, 0..6, 1000);
        program.go_on();

        assert_eq!(program.told("grown"), base);
        let gpu = world.gpu(pid);
        assert_words(&gpu, base, 0..9, 1100);
        assert_out_of_reach(&gpu, base, 9..10);
        add_to_words(&gpu, base, 0..9, 1000);
        program.go_on();

        let (was, moved) = (program.told("was"), program.told("moved"));
        let gpu = world.gpu(pid);
        assert_out_of_reach(&gpu, was, 0..12);
        assert_words(&gpu, moved, 0..9, 2100);
        assert!((9..12).all(|page| gpu.word(moved + page * PAGE) == 0));
        add_to_words(&gpu, moved, 0..9, 1000);
        program.go_on();

        let (rest, fixed) = (program.told("rest"), program.told("fixed"));
        let gpu = world.gpu(pid);
        assert_words(&gpu, rest, 0..2, 3100);
        assert_out_of_reach(&gpu, rest, 2..9);
        assert!((9..12).all(|page| gpu.word(rest + page * PAGE) == 0));
        assert_eq!([0, 8, 9].map(|page| gpu.word(fixed + page * PAGE)), [7000, 0, 7009]);
        assert_words(&gpu, fixed, 1..8, 3101);
        program.go_on();

        let (kept, copy) = (program.told("kept"), program.told("copy"));
        let gpu = world.gpu(pid);
        assert_words(&gpu, kept, 0..10, 8000);
        assert_eq!([0, 8, 9].map(|page| gpu.word(copy + page * PAGE)), [7000, 0, 7009]);
        assert_words(&gpu, copy, 1..8, 3101);
        program.go_on();

        let protected = program.told("protected");
        program.told("end");
        assert_out_of_reach(&world.gpu(pid), protected, 0..10);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn advice_means_what_it_means_for_anonymous_memory() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "advised", &[]);
        let pid = program.pid();
        let base = program.told("base");
        let gpu = world.gpu(pid);
        assert_eq!(gpu.word(base), 100);
        assert_out_of_reach(&gpu, base, 3..4);
        for page in [1, 2, 4, 5] {
            assert_eq!(gpu.word(base + page * PAGE), 0, "page {page}");
            gpu.set_word(base + page * PAGE, 1100 + page);
        }
        assert_words(&gpu, base, 6..20, 100);
        gpu.set_word(base, 1100);
        add_to_words(&gpu, base, 6..20, 1000);
        program.go_on();

        let child = i32::try_from(program.told("child")).unwrap();
        let (ours, theirs) = (world.gpu(pid), world.gpu(child));
        for page in [0, 1, 2, 4, 9, 12, 13, 14, 15, 17] {
            assert_eq!(theirs.word(base + page * PAGE), 5000 + page);
            assert_eq!(ours.word(base + page * PAGE), 1100 + page);
        }
        assert_out_of_reach(&theirs, base, 10..12);
        // What was readable and writable again when the child asked is in reach.
        assert_eq!(theirs.reaches(base + 16 * PAGE), is_late());
        program.go_on();
        program.told("end");
        assert_eq!(world.gpu(pid).word(base + 19 * PAGE), 0);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn protected_memory_is_out_of_reach_and_whole() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "protected", &[]);
        let pid = program.pid();
        let bases = [(); 4].map(|()| program.told("reached"));
        let gpu = world.gpu(pid);
        for base in bases {
            for page in [0, 2] {
                assert_words(&gpu, base, page..page + 1, 100);
                add_to_words(&gpu, base, page..page + 1, 1000);
            }
            // It asks when it tells of the first, which is readable and writable again then.
            assert_eq!(gpu.reaches(base + PAGE), is_late() && base == bases[0]);
        }
        program.go_on();
        let anew = program.told("anew");
        assert_eq!(anew, bases[0]);
        assert_words(&world.gpu(pid), anew, 0..3, 200);
        program.go_on();
        program.end_well();
    });
}

/// What is in too many parts leaves GPUs as a whole; the program goes on, and is told.
#[test]
fn mapping_in_too_many_parts_is_out_of_reach() {
    let world = World::with(AgentOptions { context_parts: 60, ..AgentOptions::default() });
    let mut program = Program::start(&world, "parts", &[]);
    let base = program.told("base");
    assert_words(&world.gpu(program.pid()), base, 0..200, 300);
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success() && said.contains("ENOSPC"), "{status} {said}");
}

/// The kernel sees several mappings in the child, where the program made one.
#[test]
fn child_without_arenas_has_its_mappings_as_they_were() {
    let world = World::with(AgentOptions { total_arena_bytes: 10 << 20, ..AgentOptions::default() });
    let mut program = Program::start(&world, "alone", &[]);
    let base = program.told("base");
    assert_words(&world.gpu(program.pid()), base, 0..2000, 100);
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success() && said.contains("ENOSPC"), "{status} {said}");
}

/// It would wait for itself if the library asked about the file with the heap locked.
#[test]
fn process_maps_files_that_it_serves_itself() {
    twice(|| {
        let world = World::new();
        let file = world.directory.path().join("served");
        let mut program = Program::start(&world, "server", &[file.to_str().unwrap()]);
        program.told("through");
        program.go_on();
        program.end_well();
    });
}

#[test]
fn calls_by_number_are_seen() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "numbered", &[]);
        let names = ["base", "moved", "file", "early"];
        let [base, was, file, early] = names.map(|name| program.told(name));
        let gpu = world.gpu(program.pid());
        for (base, pages, value) in [(base, 0..8, 100), (was, 0..4, 200), (file, 0..8, 300)] {
            assert_words(&gpu, base, pages.clone(), value);
            add_to_words(&gpu, base, pages, 1000);
        }
        assert_eq!([0, 1, 2, 3].map(|page| gpu.reaches(early + page * PAGE)), [true, true, true, false]);
        program.go_on();

        let moved = program.told("moved");
        let stayed = program.told("stayed") != 0;
        let gpu = world.gpu(program.pid());
        assert_words(&gpu, base, 0..1, 1100);
        assert_out_of_reach(&gpu, base, 1..4);
        assert_eq!(gpu.word(base + 4 * PAGE), 0);
        assert_words(&gpu, base, 5..8, 1100);
        assert_words(&gpu, moved, 0..4, 1200);
        assert_eq!(gpu.reaches(was), stayed);
        for (page, reached) in (0..).zip([true, true, false, true, true, false, true, true]) {
            assert_eq!(gpu.reaches(file + page * PAGE), reached, "page {page}");
        }
        program.go_on();

        let (grown, place) = (program.told("grown"), program.told("place"));
        let gpu = world.gpu(program.pid());
        for (page, reached) in (0..).zip([true, true, false, true, true, false, false, false]) {
            assert_eq!(gpu.reaches(file + page * PAGE), reached, "page {page}");
        }
        assert_out_of_reach(&gpu, grown, 0..3);
        assert_out_of_reach(&gpu, early, 0..4);
        assert_out_of_reach(&gpu, place, 0..4);
        for page in [0, 4, 5, 6, 7] {
            gpu.set_word(base + page * PAGE, gpu.word(base + page * PAGE) + 1000);
        }
        add_to_words(&gpu, moved, 0..4, 1000);
        program.go_on();
        program.end_well();
    });
}
