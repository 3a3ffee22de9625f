//! fork and exec.

use crate::mock::eventually;
use crate::program::{Program, is_late, twice};
use crate::world::World;

/// Each process has its memory in a context of its own, and a GPU that works for one changes nothing of another's.
fn each_has_its_own(arguments: &[&str]) {
    let world = World::new();
    let mut program = Program::start(&world, "forks", arguments);
    let [data, block, large] = ["data", "block", "large"].map(|name| program.told(name));
    for value in [3, 2, 1] {
        let pid = i32::try_from(program.told("process")).unwrap();
        let gpu = world.gpu(pid);
        assert_eq!([data, block, large].map(|at| gpu.word(at)), [value; 3], "process {value}");
        gpu.set_word(block + 8, 1000 + value);
        program.go_on();
    }
    program.told("end");
    program.end_well();
    eventually("all contexts end", || world.agent.status().contexts.is_empty());
}

#[test]
fn parent_child_and_grandchild_have_views_of_their_own() {
    twice(|| {
        each_has_its_own(&[]);
    });
}

#[test]
fn thread_that_forks_takes_its_stack_along() {
    twice(|| {
        each_has_its_own(&["thread"]);
    });
}

/// Parent and child must not write their frames, or the C library's record of the thread, to the same memory.
#[test]
fn thread_on_a_stack_of_the_programs_own_forks() {
    twice(|| {
        for kind in ["global", "mapping", "large", "small"] {
            each_has_its_own(&["thread", kind]);
            each_has_its_own(&["context", kind]);
        }
    });
}

#[test]
fn only_the_process_itself_joins_its_context() {
    twice(|| {
        let world = World::new();
        let mut other = Program::start(&world, "list", &[]);
        other.told("first");
        let theirs = world.gpu(other.pid()).ctx_id().to_string();
        let mut program = Program::start(&world, "joiner", &[world.socket().to_str().unwrap(), &theirs]);
        program.told("end");
        program.end_well();
    });
}

/// Between clone and the first handler the C library sets the locks of the child's streams free.
#[test]
fn streams_of_other_threads_go_on_after_a_fork() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "streams", &[]);
        program.told("end");
        program.end_well();
    });
}

/// The lock of the list of streams comes before the heap's, as in the C library's own fork.
#[test]
fn streams_may_be_flushed_and_allocate_during_a_fork() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "streams", &["flush"]);
        program.told("end");
        program.end_well();
    });
}

/// A message of theirs would end their parent's context.
#[test]
fn children_without_handlers_leave_their_parents_context_alone() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "children", &[]);
        let places = ["kept", "mapping", "later"].map(|name| program.told(name));
        let gpu = world.gpu(program.pid());
        assert_eq!(places.map(|at| gpu.word(at)), [77, 78, 79]);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn protections_that_were_changed_in_part_are_the_childs_too() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "halfway", &[]);
        let [base, keyed] = ["base", "keyed"].map(|name| program.told(name));
        let gpu = world.gpu(program.pid());
        // What was readable and writable again when it asked is in reach.
        assert_eq!([base, keyed].map(|at| gpu.reaches(at)), [false, is_late()]);
        assert_eq!(gpu.word(keyed + 2 * 4096), 102);
        program.go_on();
        program.end_well();
    });
}

/// A child has whatever other threads had open at that moment, and must not keep their forks waiting by it.
#[test]
fn threads_that_fork_at_once_do_not_wait_for_each_others_children() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "forkers", &[]);
        program.told("end");
        program.go_on();
        program.end_well();
    });
}
