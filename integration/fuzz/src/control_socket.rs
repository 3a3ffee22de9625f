//! Target: any bytes on the operator's socket, as one client sends them before it stops writing.
//!
//! Every line that comes back is JSON; a batch is an array, all else a response with a result or an error; no method
//! fails for a reason of its own; the server ends the connection by itself.

use crate::{exclusive, must};
use daemon::control::{ControlState, Options, serve};
use daemon::limits::Limits;
use daemon::registry::{self, Registry};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::Notify;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::host::Host;

/// After so long without a byte, something hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// What an input calls the folder in which guests may have sockets.
const FOLDER: &[u8] = b"/DIR/";
const LIMITS: Limits = Limits {
    contexts: 4,
    pending_faults: 8,
    jobs: 8,
    mappings: 16,
    resources: 4,
    fault_deadline_ms: 0,
    ..Limits::DEFAULT
};

struct Server {
    registry: Arc<Registry>,
    socket: PathBuf,
    dir: TempDir,
}

static SERVER: LazyLock<Mutex<Server>> = LazyLock::new(|| {
    let dir = must(tempfile::tempdir());
    let device = SoftDevice::new(SoftConfig { ledger: Some(8), ..SoftConfig::default() });
    let runtime_dirs = vec![dir.path().to_owned()];
    let options = registry::Options { runtime_dirs, limits: LIMITS, allow_unsealed: false };
    let registry = must(Registry::new(Host::new(vec![device]), options));
    let socket = dir.path().join("control.sock");
    let (ready, is_ready) = mpsc::channel();
    let (state, path) = (ControlState::new(Arc::clone(&registry), Arc::new(Notify::new())), socket.clone());
    // It serves until the process ends.
    std::thread::spawn(move || {
        let runtime = must(tokio::runtime::Builder::new_current_thread().enable_all().build());
        runtime.block_on(async {
            let listener = must(tokio::net::UnixListener::bind(path));
            must(ready.send(()));
            serve(listener, state, Options::default()).await;
        });
    });
    must(is_ready.recv_timeout(PATIENCE));
    Mutex::new(Server { registry, socket, dir })
});

/// Sends the bytes and reads what comes back.
///
/// # Panics
/// If one of the module's statements does not hold.
pub fn run(bytes: &[u8]) {
    let server = exclusive(&SERVER);
    let sent = in_folder(bytes, &server.dir);
    let stream = must(UnixStream::connect(&server.socket));
    must(stream.set_read_timeout(Some(PATIENCE)));
    must(stream.set_write_timeout(Some(PATIENCE)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Who writes past the end of a connection that was cut off is told; the lines tell the rest.
            (&stream).write_all(&sent).and_then(|()| stream.shutdown(Shutdown::Write)).ok();
        });
        let mut reader = BufReader::new(&stream);
        let mut line = Vec::new();
        while must(reader.read_until(b'\n', &mut line)) > 0 {
            check(&line);
            line.clear();
        }
    });
    for guest in server.registry.list() {
        server.registry.remove(&guest.name);
    }
}

/// Paths below [`FOLDER`] lead into the server's folder, which has another name each time.
fn in_folder(bytes: &[u8], dir: &TempDir) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), bytes);
    while let Some((first, after)) = rest.split_first() {
        match rest.strip_prefix(FOLDER) {
            Some(below) => {
                out.extend(dir.path().as_os_str().as_encoded_bytes());
                out.push(b'/');
                rest = below;
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

fn check(line: &[u8]) {
    let text = String::from_utf8_lossy(line);
    let Ok(value) = serde_json::from_slice::<Value>(line) else { panic!("no JSON: {text}") };
    let responses = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
    assert!(!responses.is_empty(), "an empty batch");
    for response in responses {
        if response.get("method").is_some() {
            continue;
        }
        let (result, error) = (response.get("result"), response.get("error"));
        assert!(result.is_some() != error.is_some(), "neither or both of result and error: {text}");
        let internal = error.is_some_and(|error| error["code"] == -32603);
        assert!(!internal, "a method failed: {text}");
    }
}
