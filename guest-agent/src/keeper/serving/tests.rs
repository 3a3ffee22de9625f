//! A serving process that no signal ends, with a FUSE server that does not answer.

#![expect(unsafe_code, reason = "mounts a file system, as only root can")]

use super::*;
use crate::lacking::lacking;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

const INIT: u32 = 26;
const OPEN: u32 = 14;
const FLUSH: u32 = 25;
const ENOSYS: i32 = 38;

/// Serves one file. Who closes it waits until the test answers.
struct SilentServer {
    device: File,
    /// Names of those who wait.
    flushed: mpsc::Receiver<u64>,
}

impl SilentServer {
    /// In a mount namespace of the calling thread. The error says what lacks.
    fn mount(path: &Path) -> io::Result<Self> {
        // SAFETY: the thread leaves the namespace of the others, and with it nothing that they have.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let text = |text: &str| std::ffi::CString::new(text).unwrap();
        let (root, none) = (text("/"), text("none"));
        let flags = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: the strings live beyond the call; without a type and data the kernel reads no more of them.
        let private =
            unsafe { libc::mount(none.as_ptr(), root.as_ptr(), std::ptr::null(), flags, std::ptr::null()) };
        let (at, fuse) = (text(path.to_str().unwrap()), text("fuse"));
        let options = text(&format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd()));
        let data = options.as_ptr().cast();
        // SAFETY: the strings live beyond the call, and the data are the text that a FUSE mount wants.
        let mounted = unsafe { libc::mount(none.as_ptr(), at.as_ptr(), fuse.as_ptr(), 0, data) };
        if private != 0 || mounted != 0 {
            return Err(io::Error::last_os_error());
        }
        let (sender, flushed) = mpsc::channel();
        let mut serving = device.try_clone()?;
        std::thread::spawn(move || while serve_one(&mut serving, &sender).is_some() {});
        Ok(Self { device, flushed })
    }
}

fn reply(device: &mut File, unique: u64, error: i32, body: &[u8]) {
    let len = u32::try_from(16 + body.len()).unwrap();
    let head = [&len.to_ne_bytes()[..], &(-error).to_ne_bytes(), &unique.to_ne_bytes(), body].concat();
    // The one that asked may be gone.
    drop(device.write(&head));
}

fn serve_one(device: &mut File, flushed: &mpsc::Sender<u64>) -> Option<()> {
    let mut request = vec![0; 1 << 17];
    // One request a read.
    let len = device.read(&mut request).ok()?;
    assert!(len >= 40, "{len} bytes are no request");
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
    let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
    match word(4) {
        INIT => {
            let mut body = [0; 64];
            for (at, value) in [(0, 7u32), (4, 31), (20, 1 << 16), (24, 1)] {
                body[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
            reply(device, unique, 0, &body);
        }
        OPEN => reply(device, unique, 0, &[0; 16]),
        FLUSH => flushed.send(unique).ok()?,
        _ => reply(device, unique, ENOSYS, &[]),
    }
    Some(())
}

#[test]
fn process_that_hangs_in_a_file_of_another_one_does_not_hold_the_keeper_up() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // The namespace is this thread's alone.
    let stuck = std::thread::scope(|scope| {
        let playing = scope.spawn(|| {
            let mut server = match SilentServer::mount(file.path()) {
                Ok(server) => server,
                Err(error) => {
                    lacking(&format!("a process that hangs in a file of another one (FUSE: {error})"));
                    return true;
                }
            };
            // Opens and closes the file.
            let script = format!("exec 3<{}; exec 3<&-; sleep 1000", file.path().display());
            let mut child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
            let first = server.flushed.recv_timeout(Duration::from_secs(30)).unwrap();
            end_child(&mut child);
            let stuck = child.try_wait().unwrap().is_none();
            reply(&mut server.device, first, 0, &[]);
            // Its end closes what else it has.
            while let Ok(None) = child.try_wait() {
                if let Ok(unique) = server.flushed.recv_timeout(Duration::from_millis(5)) {
                    reply(&mut server.device, unique, 0, &[]);
                }
            }
            stuck
        });
        playing.join().unwrap()
    });
    assert!(stuck, "it was not stuck, so nothing was tested");
}

#[test]
fn process_that_ends_is_waited_for() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    end_child(&mut child);
    // A look at the moment when it waits in the kernel takes it for one that hangs.
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "killed, and not ended");
        std::thread::sleep(Duration::from_millis(1));
    }
}
