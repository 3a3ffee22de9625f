//! Saved inputs, each run as the fuzzers run it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Runs every input of a target's pack; of the one that fails it says where it is.
pub fn replay(target: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("corpus/{target}.pack"));
    let bytes = std::fs::read(&path).unwrap();
    let run = fuzz::target(target).unwrap();
    let inputs = fuzz::pack::unpack(&bytes).unwrap();
    assert!(!inputs.is_empty(), "{path:?} is empty");
    for (n, input) in inputs.iter().enumerate() {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(input))) {
            eprintln!("failed: input {n:05} of {} ({} bytes)", path.display(), input.len());
            resume_unwind(panic);
        }
    }
}
