//! `libsvm_alloc.so`: a program that runs with it has its memory where GPUs reach it, and passes plain pointers to them.
//!
//! Loaded before the C library (`LD_PRELOAD`), or linked. It serves malloc and its relatives from arenas, memory that the
//! agent of the guest made, pinned and knows ([`guest_agent::message`]), and moves there the globals of the program and
//! its libraries, the stacks of new threads, and what the program maps by itself.
//!
//! * `exports`: the C functions, and what runs when the library is loaded.
//! * `heap`, `growing`: one lock, small blocks by dlmalloc, large ones with an arena each.
//! * `piece`, `space`: the table of arenas; what happens when the agent gives none.
//! * `link`: the connection to the agent.
//! * `globals`, `loaded`, `stack`, `maps`: memory that is not malloc's. `fork`: the child that must not share any.
//! * `pinned`: what a trusted process pins by itself, because no arena can take its place.
//! * `streams`: memory of the C library that must not be in arenas.
//! * `real`: what this library stands before.
//! * `thread_word`: what is kept for each thread.
//! * `left`: what GPUs do not reach, and why.
//! * `fd`, `say`: descriptors, and the one line on standard error.
//!
//! Whatever happens under the heap's lock allocates nothing, because the only allocator is this one: no `Vec`, no
//! `String`, no boxed error, no panic that is expected. A program that uses none of it pays for one connection.

mod exports;
mod fd;
mod fork;
mod globals;
mod growing;
mod heap;
mod left;
mod link;
#[cfg(target_arch = "x86_64")]
mod loaded;
mod maps;
mod piece;
mod pinned;
mod real;
mod say;
mod space;
mod stack;
mod streams;
mod thread_word;

pub use exports::{LeftOut, svm_alloc_left, svm_alloc_session, svm_alloc_why};
