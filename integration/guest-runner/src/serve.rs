//! The server of the command channel: starts processes, forwards what they write, reports their end.
//!
//! One thread reads requests. Each process has four: one per stream, one that feeds its standard input (a process that
//! does not read must not hold up the others), and one that waits for its end.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use guest_runner::{CHANNEL, Event, Request, Stream};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::system::uname;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Read at once; a longer line is sent in pieces.
const PIECE_BYTES: usize = 16 << 10;
/// What a pipe holds, so all that a process can have written and we not read when it ends.
const PIPE_BYTES: usize = 64 << 10;

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
        let streams = [
            child.stdout.take().map(|stdout| (Stream::Stdout, OwnedFd::from(stdout))),
            child.stderr.take().map(|stderr| (Stream::Stderr, OwnedFd::from(stderr))),
        ];
        let (done, drained) = mpsc::channel();
        for (stream, pipe) in streams.into_iter().flatten() {
            let process = pidfd.try_clone()?;
            let (sink, done) = (self.sink.clone(), Some(done.clone()));
            let pending = Vec::new();
            let forward = Forward { sink, id, stream, pipe, process, done, left_bytes: PIPE_BYTES, pending };
            thread::spawn(move || forward.run());
        }
        drop(done);
        self.processes.with(|all| all.insert(id, Process { pidfd, stdin }));
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

/// One output stream of a process on its way to the host, in whole lines so that no character is cut.
struct Forward {
    sink: Sink,
    id: u64,
    stream: Stream,
    pipe: OwnedFd,
    /// Readable when the process has ended.
    process: OwnedFd,
    /// Dropped as soon as all that the process itself wrote is sent.
    done: Option<Sender<()>>,
    /// What an ended process can have left in the pipe.
    left_bytes: usize,
    pending: Vec<u8>,
}

impl Forward {
    /// Forwards until nobody holds the other end: a descendant may go on writing when the process has ended, and must not
    /// run into a closed pipe.
    fn run(mut self) {
        while self.step().is_ok_and(|more| more) {}
        self.send_pending(0);
    }

    /// Returns whether there may be more.
    fn step(&mut self) -> io::Result<bool> {
        let (readable, ended) = self.wait()?;
        if ended && (!readable || self.left_bytes == 0) {
            self.send_pending(0);
            self.done = None;
        }
        if !readable {
            return Ok(true);
        }
        let mut piece = [0; PIECE_BYTES];
        let count = retry_on_intr(|| rustix::io::read(&self.pipe, &mut piece))?;
        if ended {
            self.left_bytes = self.left_bytes.saturating_sub(count);
        }
        self.pending.extend(piece.iter().take(count));
        let rest = self.pending.iter().rev().position(|byte| *byte == b'\n').unwrap_or(self.pending.len());
        self.send_pending(if rest < PIECE_BYTES { rest } else { 0 });
        Ok(count > 0)
    }

    /// Whether the pipe is readable, and whether the process has ended and that matters still.
    fn wait(&self) -> io::Result<(bool, bool)> {
        // They are looked at in this order: of a process that was seen to have ended, the pipe has all that it wrote.
        let mut both = [PollFd::new(&self.process, PollFlags::IN), PollFd::new(&self.pipe, PollFlags::IN)];
        let watched = if self.done.is_some() { &mut both[..] } else { &mut both[1..] };
        retry_on_intr(|| poll(watched, None))?;
        let [process, pipe] = both.map(|fd| !fd.revents().is_empty());
        Ok((pipe, process))
    }

    /// Sends all but the last `rest` bytes.
    fn send_pending(&mut self, rest: usize) {
        let kept = self.pending.split_off(self.pending.len().saturating_sub(rest));
        let whole = std::mem::replace(&mut self.pending, kept);
        if !whole.is_empty() {
            let data = String::from_utf8_lossy(&whole).into_owned();
            self.sink.send(&Event::Output { id: self.id, stream: self.stream, data });
        }
    }
}

fn reap(id: u64, mut child: Child, drained: &Receiver<()>) -> Event {
    let status = child.wait();
    // Nothing is ever sent: this waits until both streams have dropped their end.
    drained.recv().ok();
    match status {
        Ok(status) => Event::Exited { id, code: status.code(), signal: status.signal() },
        Err(error) => Event::Refused { id, error: error.to_string() },
    }
}
