//! `libsvm_alloc.so`: a program that runs with it has its memory where GPUs reach it, and passes plain pointers to them.
//!
//! Loaded before the C library (`LD_PRELOAD`), or linked. When the process first asks for a device ([`svm_alloc_session`]),
//! what malloc and its relatives have given is put in arenas, memory that the agent of the guest made, pinned and knows
//! ([`guest_agent::message`]); so are the globals of the program and its libraries, the stacks of threads, and what the
//! program has mapped by itself. From then on new memory is, as it comes.
//!
//! * `exports`: the C functions, and what runs when the library is loaded.
//! * `heap`, `growing`: one lock, small blocks by dlmalloc, large ones with an arena each.
//! * `piece`, `space`: the table of arenas; what happens when the agent gives none.
//! * `link`: the connection to the agent.
//! * `waking`, `others`, `under_way`: the first time that a device is asked for; the threads that stand still meanwhile, and
//!   the calls that are waited for.
//! * `globals`, `loaded`, `stack`, `maps`: memory that is not malloc's. `fork`: the child that must not share any.
//! * `pinned`: what a trusted process pins by itself, because no arena can take its place.
//! * `streams`: memory of the C library that must not be in arenas.
//! * `real`, `numbered`: what this library stands before, called by name and by number.
//! * `thread_word`: what is kept for each thread.
//! * `left`: what GPUs do not reach, and why.
//! * `proc`, `fd`, `say`: what the kernel tells, descriptors, and the one line on standard error.
//!
//! Whatever happens under the heap's lock allocates nothing, because the only allocator is this one: no `Vec`, no
//! `String`, no boxed error, no panic that is expected. A program that uses none of it pays for next to
//! nothing.

mod exports;
mod fd;
mod fork;
mod globals;
mod growing;
mod heap;
mod left;
mod link;
mod loaded;
mod maps;
mod numbered;
mod others;
mod piece;
mod pinned;
mod proc;
mod real;
mod say;
mod space;
mod stack;
mod streams;
mod thread_word;
mod under_way;
mod waking;

pub use exports::{LeftOut, svm_alloc_left, svm_alloc_session, svm_alloc_why};
