//! What a test says when this machine lacks something that it needs.

use std::io::Write;

/// A test is not run, or not all of it, for want of what the machine can be given: where CI is set, that fails.
pub fn lacking(what: &str) {
    say(what);
    assert!(std::env::var_os("CI").is_none(), "{what}, and CI is set");
}

/// As [`lacking`], for what a machine may refuse to give: huge pages, for which its memory may be too fragmented, or which
/// its owner keeps to himself. The QEMU test of this name has them in a guest of its own, and needs nothing of the machine.
pub fn tested_in_qemu(what: &str, test: &str) {
    say(&format!("{what}; {test} does test it"));
}

/// Not by `eprintln`, which the harness keeps to itself.
fn say(what: &str) {
    std::io::stderr().write_all(format!("not tested here: {what}\n").as_bytes()).unwrap();
}
