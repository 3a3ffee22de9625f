//! The code costs the instructions that are recorded.

use integration::instructions::{COMMAND, Figures, measure, valgrind};
use std::io::Write;

#[test]
fn recorded_instruction_counts_are_those_of_the_code() {
    let valgrind = match valgrind() {
        Ok(valgrind) => valgrind,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "instructions cannot be counted here: {error:#}");
            // Not captured by the test harness, unlike eprintln.
            let warning = format!("instructions are NOT counted here: {error:#}\n");
            std::io::stderr().write_all(warning.as_bytes()).unwrap();
            return;
        }
    };
    let (recorded, counted) = (Figures::recorded().unwrap(), measure(&valgrind).unwrap());
    if !recorded.is_made_like(&counted) {
        let note =
            "instructions are held to 15 % here: with CARGO_INCREMENTAL=0 and the recorded libc to 2 %\n";
        std::io::stderr().write_all(note.as_bytes()).unwrap();
    }
    let differences = recorded.differences(&counted);
    assert!(
        differences.is_empty(),
        "{}\nrecorded with {}, {}; counted with {}, {}. If the code is to cost this, record it: {COMMAND}\n{}",
        differences.join("\n"),
        recorded.rustc,
        recorded.libc,
        counted.rustc,
        counted.libc,
        counted.table()
    );
}
