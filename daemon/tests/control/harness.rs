//! A control server on a thread of the test, and clients that give up instead of hanging.

use daemon::control::{ControlState, Options, serve};
use daemon::limits::Limits;
use daemon::registry::{self, Registry};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::Notify;
use virtio_gpu_svm::device::Device;
use virtio_gpu_svm::host::Host;

/// After so long without an answer a test has failed; on a machine that works it takes microseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Of every guest.
pub const LIMITS: Limits = Limits {
    contexts: 4,
    pending_faults: 16,
    jobs: 16,
    mappings: 64,
    resources: 16,
    fault_deadline_ms: 0,
    ..Limits::DEFAULT
};

/// A registry and its control socket, without guests, in a folder of its own.
pub struct Server {
    pub registry: Arc<Registry>,
    dir: TempDir,
    stop: Arc<Notify>,
    asked_to_shut_down: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(Options::default())
    }

    pub fn start_with(options: Options) -> Self {
        Self::start_on(Vec::new(), options)
    }

    pub fn start_on(devices: Vec<Arc<dyn Device>>, options: Options) -> Self {
        Self::start_limited(devices, options, LIMITS)
    }

    pub fn start_limited(devices: Vec<Arc<dyn Device>>, options: Options, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(
            Host::new(devices),
            registry::Options { runtime_dirs: vec![dir.path().to_owned()], limits, allow_unsealed: false },
        )
        .unwrap();
        let shutdown = Arc::new(Notify::new());
        let stop = Arc::new(Notify::new());
        let (asked, asked_to_shut_down) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let socket = dir.path().join("control.sock");
        let (state, stopped) =
            (ControlState::new(Arc::clone(&registry), Arc::clone(&shutdown)), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::bind(socket).unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    () = serve(listener, state, options) => {}
                    () = shutdown.notified() => asked.send(()).unwrap(),
                    () = stopped.notified() => {}
                }
            });
        });
        is_ready.recv_timeout(PATIENCE).unwrap();
        Self { registry, dir, stop, asked_to_shut_down, thread: Some(thread) }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join("control.sock")
    }

    /// A path for a guest's socket that the daemon accepts.
    pub fn guest_socket(&self, name: &str) -> String {
        self.dir().join(name).to_str().unwrap().to_owned()
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    /// Waits until a client's `shutdown` has reached the daemon.
    pub fn wait_for_shutdown(&self) {
        self.asked_to_shut_down.recv_timeout(PATIENCE).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.notify_one();
        let ended = self.thread.take().unwrap().join();
        self.registry.shutdown();
        // A second panic while the first unwinds would hide what went wrong.
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// A connection to a control socket.
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    pub fn connect(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).unwrap())
    }

    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { reader: BufReader::new(stream) }
    }

    pub fn stream(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.reader.get_ref().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line as JSON; `None` at the end of the stream.
    pub fn try_line(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    pub fn line(&mut self) -> Value {
        self.try_line().unwrap()
    }

    /// The whole response to a request.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": "call", "method": method, "params": params });
        self.send(format!("{request}\n"));
        let response = self.line();
        assert_eq!(response["jsonrpc"], "2.0");
        assert_eq!(response["id"], "call");
        response
    }

    /// The response to a request, or the one that refuses the connection.
    pub fn call_or_refusal(&mut self) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": "stats.get" });
        // Writing fails on a connection that was refused; what was said before is there all the same.
        self.reader.get_ref().write_all(format!("{request}\n").as_bytes()).ok();
        self.line()
    }

    pub fn result(&mut self, method: &str, params: Value) -> Value {
        let response = self.call(method, params);
        assert!(response["error"].is_null(), "{method}: {response}");
        response["result"].clone()
    }

    /// The code and the kind of the error that a request must end with.
    pub fn error(&mut self, method: &str, params: Value) -> (i64, String) {
        error_of(&self.call(method, params))
    }
}

/// The code and the kind of an error response.
pub fn error_of(response: &Value) -> (i64, String) {
    let error = &response["error"];
    assert!(response["result"].is_null(), "a result where an error was due: {response}");
    assert!(!error["message"].as_str().unwrap().is_empty());
    (error["code"].as_i64().unwrap(), error["data"]["kind"].as_str().unwrap().to_owned())
}
