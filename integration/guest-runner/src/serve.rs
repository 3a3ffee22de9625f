//! The server of the command channel: starts processes, forwards what they write, reports their end.
//!
//! One thread reads requests. Each process has four: one per stream, one that feeds its standard input (a process that
//! does not read must not hold up the others), and one that waits for its end.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use guest_runner::{CHANNEL, Event, Request, Stream};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::system::uname;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Longest piece of a line that is sent at once.
const PIECE_BYTES: u64 = 16 << 10;
/// How long a process' end waits for output that a descendant may still hold open.
const DRAIN: Duration = Duration::from_millis(300);

/// Serves until the host asks for power-off or closes the channel.
///
/// # Errors
/// Fails when the channel does.
pub fn run() -> io::Result<()> {
    let channel = OpenOptions::new().read(true).write(true).open(CHANNEL)?;
    let mut termios = tcgetattr(&channel)?;
    termios.make_raw();
    tcsetattr(&channel, OptionalActions::Now, &termios)?;
    let sink = Sink(Arc::new(Mutex::new(channel.try_clone()?)));
    let server = Server { sink, processes: Processes::default() };
    server.serve(BufReader::new(channel))
}

/// Where events go, a line each.
#[derive(Clone)]
struct Sink(Arc<Mutex<File>>);

impl Sink {
    fn send(&self, event: &Event) {
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        let mut channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = channel.write_all(&line) {
            eprintln!("guest-runner: event not sent: {error}");
        }
    }

    fn refuse(&self, id: u64, error: &dyn std::fmt::Display) {
        self.send(&Event::Refused { id, error: error.to_string() });
    }
}

/// What requests can reach of a process.
struct Process {
    pidfd: OwnedFd,
    stdin: Option<Sender<String>>,
}

/// Those that have not been reaped. The lock is held for a look-up only.
#[derive(Clone, Default)]
struct Processes(Arc<Mutex<HashMap<u64, Process>>>);

impl Processes {
    fn with<R>(&self, act: impl FnOnce(&mut HashMap<u64, Process>) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Server {
    sink: Sink,
    processes: Processes,
}

impl Server {
    fn serve(self, requests: BufReader<File>) -> io::Result<()> {
        let release = uname().release().to_string_lossy().into_owned();
        self.sink.send(&Event::Ready { release });
        for line in requests.lines() {
            match serde_json::from_str(&line?) {
                Ok(Request::PowerOff) => return Ok(()),
                Ok(request) => self.on_request(request),
                Err(error) => eprintln!("guest-runner: not a request: {error}"),
            }
        }
        Ok(())
    }

    fn on_request(&self, request: Request) {
        match request {
            Request::Spawn { id, uid, argv } => {
                if let Err(error) = self.spawn(id, uid, &argv) {
                    self.sink.refuse(id, &error);
                }
            }
            Request::Stdin { id, data } => {
                let stdin = self.processes.with(|all| all.get(&id)?.stdin.clone());
                if stdin.is_none_or(|stdin| stdin.send(data).is_err()) {
                    eprintln!("guest-runner: standard input of process {id} is closed");
                }
            }
            Request::CloseStdin { id } => self.processes.with(|all| {
                if let Some(process) = all.get_mut(&id) {
                    process.stdin = None;
                }
            }),
            Request::Kill { id, signal } => self.kill(id, signal),
            Request::PowerOff => {}
        }
    }

    fn spawn(&self, id: u64, uid: u32, argv: &[String]) -> io::Result<()> {
        let [program, arguments @ ..] = argv else { return Err(io::Error::other("no program")) };
        let mut child = Command::new(program)
            .args(arguments)
            .uid(uid)
            .gid(uid)
            .current_dir("/tmp")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
        let pid = child.id();
        // The child is not reaped before the thread below runs, so the number still is its own.
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        self.sink.send(&Event::Started { id, pid });
        let stdin = child.stdin.take().map(feed);
        self.processes.with(|all| all.insert(id, Process { pidfd, stdin }));
        let (done, drained) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            forward(self.sink.clone(), id, Stream::Stdout, stdout, done.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            forward(self.sink.clone(), id, Stream::Stderr, stderr, done);
        }
        let (sink, processes) = (self.sink.clone(), self.processes.clone());
        thread::spawn(move || {
            let exited = reap(id, child, &drained);
            processes.with(|all| all.remove(&id));
            sink.send(&exited);
        });
        Ok(())
    }

    /// A process that has ended needs no signal.
    fn kill(&self, id: u64, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else {
            eprintln!("guest-runner: there is no signal {signal}");
            return;
        };
        let sent =
            self.processes.with(|all| all.get(&id).map(|process| pidfd_send_signal(&process.pidfd, signal)));
        if let Some(Err(error)) = sent {
            eprintln!("guest-runner: signal to process {id} not sent: {error}");
        }
    }
}

fn feed(mut stdin: ChildStdin) -> Sender<String> {
    let (sender, receiver) = mpsc::channel::<String>();
    thread::spawn(move || {
        for data in receiver {
            if stdin.write_all(data.as_bytes()).is_err() {
                return;
            }
        }
    });
    sender
}

/// Sends whole lines, so that no character is cut; only a line longer than a piece is.
fn forward(sink: Sink, id: u64, stream: Stream, source: impl Read + Send + 'static, done: Sender<()>) {
    thread::spawn(move || {
        let mut source = BufReader::new(source);
        let mut piece = Vec::new();
        while let Ok(1..) = (&mut source).take(PIECE_BYTES).read_until(b'\n', &mut piece) {
            let data = String::from_utf8_lossy(&piece).into_owned();
            sink.send(&Event::Output { id, stream, data });
            piece.clear();
        }
        // Nobody waits any more once the end was reported.
        done.send(()).ok();
    });
}

fn reap(id: u64, mut child: Child, drained: &Receiver<()>) -> Event {
    let status = child.wait();
    // One message per stream; an error means that both have ended, or that a descendant holds one.
    while drained.recv_timeout(DRAIN).is_ok() {}
    match status {
        Ok(status) => Event::Exited { id, code: status.code(), signal: status.signal() },
        Err(error) => Event::Refused { id, error: error.to_string() },
    }
}
