//! Shared memory of the program: GPUs reach the program's own pages, for each process that maps them.

use crate::maps::{PAGE, add_to_words, assert_out_of_reach, assert_words};
use crate::program::{Program, twice};
use crate::world::World;

#[test]
fn shared_memory_is_reached_by_each_process_that_has_it() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "shared", &[world.directory.path().to_str().unwrap()]);
        let pid = program.pid();
        let bases = [(); 4].map(|()| program.told("reached"));
        let again = program.told("again");
        let gpu = world.gpu(pid);
        for (value, base) in (0..).step_by(100).zip(bases) {
            assert_words(&gpu, base, 0..8, value);
            add_to_words(&gpu, base, 1..8, 1000);
        }
        add_to_words(&gpu, again, 0..1, 1000);
        for base in &bases[1..] {
            add_to_words(&gpu, *base, 0..1, 1000);
        }
        program.go_on();

        for generation in (0..3).rev() {
            let pid = i32::try_from(program.told("process")).unwrap();
            let gpu = world.gpu(pid);
            for page in [0, 1, 3, 5, 7] {
                assert!(gpu.reaches(bases[0] + page * PAGE), "page {page}");
            }
            for page in [2, 4, 6] {
                assert_out_of_reach(&gpu, bases[0], page..page + 1);
            }
            assert_eq!(gpu.reaches(bases[1] + PAGE), generation == 0);
            assert_words(&gpu, bases[1], 2..8, 1100);
            assert_words(&gpu, bases[2], 0..8, 5000);
            // A private mapping of the same file is each one's own.
            assert_words(&gpu, bases[3], 0..8, if generation == 2 { 6000 } else { 1300 });
            gpu.set_word(again, 77);
            program.go_on();
        }

        let (grown, fixed) = (program.told("grown"), program.told("fixed"));
        let gpu = world.gpu(pid);
        assert_words(&gpu, grown, 0..1, 7000);
        assert_out_of_reach(&gpu, grown, 1..3);
        assert_words(&gpu, grown, 3..12, 7000);
        assert_eq!([0, 1, 2].map(|page| gpu.word(fixed + page * PAGE)), [1300, 7001, 1302]);
        gpu.set_word(fixed + PAGE, 7777);
        program.go_on();

        let [disk, short, read_only] = ["disk", "short", "read-only"].map(|name| program.told(name));
        let gpu = world.gpu(pid);
        assert_out_of_reach(&gpu, disk, 0..8);
        assert_out_of_reach(&gpu, read_only, 0..8);
        assert_words(&gpu, short, 0..8, 200);
        assert_out_of_reach(&gpu, short, 8..12);
        program.go_on();
        program.end_well();
    });
}
