//! What a guest is told, and nothing else: every byte of every answer and record is the protocol's, and no byte of one
//! process or guest comes to another, nor into the daemon's log.
//!
//! * `answers`: all commands of the tables of `bad_input`, good and bad, with every room; what is written, and that it
//!   does not depend on what the daemon has done for others before.
//! * `canaries`: a process that writes its secrets wherever it can, and everybody who must not see them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "a page's size as usize")]

mod answers;
mod canaries;
#[path = "../bad_input/rows.rs"]
#[expect(dead_code, reason = "shared with the tests of bad input, which look at errnos")]
mod rows;
#[path = "../bad_input/scene.rs"]
#[expect(dead_code, reason = "shared with the tests of bad input, which use more of it")]
mod scene;
