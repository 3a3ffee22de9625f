//! What sessions, contexts, guests and operators leave behind in a daemon that goes on: not a byte, thread or
//! descriptor, whenever their VMM leaves and however often they come.
//!
//! `leaving` and `growth`: the daemon is in this process (its registry, soft devices with and without faults,
//! housekeeper, control socket), so that the heap can be counted. `process`: svmd itself, from outside. One test runs at
//! a time. With `SVM_TIMES=10000` it is not a few hundred times but ten thousand, and a VMM leaves at every byte.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod growth;
#[path = "../../../virtio-gpu-svm/tests/scenarios/heap.rs"]
#[expect(dead_code, reason = "shared with the scenarios, which use the rest of it")]
mod heap;
mod leaving;
mod process;
mod rig;
mod script;
mod vmm;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

/// After so long without what is waited for a test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// One request on a control socket; the response.
fn control(socket: &Path, method: &str, params: &str) -> serde_json::Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#).unwrap();
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}
