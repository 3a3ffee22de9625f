//! Scenarios: agents that lie, stall or die, processes that die with faults pending, guests that begin anew, VMMs that
//! disappear; in every state that an honest run reaches, and drawn at random. Time is a number.
//!
//! * who is honest, and whose guest nobody disturbs, gets exactly its results, in its own memory;
//! * a fault is told to its owner only, and ends once; a job ends once;
//! * a page that was let go is not touched any more;
//! * when the guests have gone nothing is left: no context, asid, GPU VM, fault, translation, nor a byte on the heap.
//!
//! `SVM_SEED=n` makes others, `SVM_SCENARIOS=n` more. Some orders are not the seed's: those in which hash tables are
//! walked when several faults end at once.
#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step is a failed test")]

mod agent;
mod driver;
mod guest;
#[expect(dead_code, reason = "shared with the daemon's tests, which use the rest of it")]
mod heap;
mod machine;
#[path = "../core/mock.rs"]
#[expect(dead_code, reason = "shared with the core's tests, which use more of it")]
mod mock;
mod process;
mod ram;
mod random;
mod scenes;
mod world;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;
