//! Guests are added and removed: what is idempotent, what is refused, what happens in the file system.

use crate::vmm::{PATIENCE, Vmm};
use crate::{Daemon, spec};
use daemon::registry::{AddError, GuestSpec, RegistryEvent};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Barrier, Mutex};
use std::time::Duration;

#[test]
fn add_and_remove_are_idempotent() {
    let daemon = Daemon::start();
    let path = daemon.path("vm0.sock");
    assert!(daemon.registry.add(spec("vm0", &path)).unwrap());
    assert!(!daemon.registry.add(spec("vm0", &path)).unwrap());
    // The same place under another name of it.
    fs::create_dir(daemon.path("sub")).unwrap();
    assert!(!daemon.registry.add(spec("vm0", &daemon.path("sub/../vm0.sock"))).unwrap());
    assert!(daemon.registry.remove("vm0"));
    assert!(!daemon.registry.remove("vm0"));
    assert!(!path.exists());
    assert_eq!(daemon.event(), RegistryEvent::GuestAdded { name: "vm0".into() });
    assert_eq!(daemon.event(), RegistryEvent::GuestRemoved { name: "vm0".into() });
    assert!(daemon.events.try_recv().is_err());
}

#[test]
fn bad_names_are_refused() {
    let daemon = Daemon::start();
    let long = "a".repeat(65);
    for name in ["", ".", "..", "a b", "a/b", "ä", "a\0", long.as_str()] {
        let refused = daemon.registry.add(spec(name, &daemon.path("x.sock")));
        assert!(matches!(refused, Err(AddError::BadName(_))), "{name:?}");
    }
    let longest = "a".repeat(64);
    assert!(daemon.registry.add(spec(&longest, &daemon.path("x.sock"))).unwrap());
}

#[test]
fn taken_names_and_sockets_are_refused() {
    let daemon = Daemon::start();
    let path = daemon.add("vm0");
    let other = daemon.registry.add(spec("vm0", &daemon.path("other.sock")));
    assert!(matches!(other, Err(AddError::NameTaken { .. })));
    let shared = daemon.registry.add(spec("vm1", &path));
    assert!(matches!(shared, Err(AddError::SocketInUse(_))));
    assert!(!daemon.path("other.sock").exists());
    // Refusals have disturbed nobody.
    let mut vmm = Vmm::start(&path);
    assert!(!vmm.command(&[0; 24]).is_empty());
    daemon.guest("vm0");
    assert_eq!(daemon.registry.get("vm0").unwrap().sessions, 1);
}

#[test]
fn sockets_outside_the_runtime_folders_are_refused() {
    let daemon = Daemon::start();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), daemon.path("link")).unwrap();
    let paths = [
        outside.path().join("vm0.sock"),
        daemon.path("../vm0.sock"),
        daemon.path("link/vm0.sock"),
        daemon.path(".."),
        PathBuf::from("/"),
        PathBuf::from("/nonexistent/vm0.sock"),
    ];
    for path in paths {
        let refused = daemon.registry.add(spec("vm0", &path));
        assert!(matches!(refused, Err(AddError::SocketOutsideRuntimeDirs(_))), "{path:?}: {refused:?}");
    }
    assert!(fs::read_dir(outside.path()).unwrap().next().is_none());
    // Below is enough.
    fs::create_dir(daemon.path("sub")).unwrap();
    assert!(daemon.registry.add(spec("vm0", &daemon.path("sub/vm0.sock"))).unwrap());
}

#[test]
fn missing_folder_and_over_long_path_are_io_errors() {
    let daemon = Daemon::start();
    for path in [daemon.path("missing/vm0.sock"), daemon.path(&"a".repeat(120))] {
        let refused = daemon.registry.add(spec("vm0", &path));
        assert!(matches!(refused, Err(AddError::Io { .. })), "{path:?}: {refused:?}");
    }
}

#[test]
fn unknown_device_is_refused() {
    let daemon = Daemon::start();
    let devices = Some(vec!["gpu9".to_owned()]);
    let refused = daemon.registry.add(GuestSpec { devices, ..spec("vm0", &daemon.path("vm0.sock")) });
    assert!(matches!(refused, Err(AddError::UnknownDevice(name)) if name == "gpu9"));
    assert!(!daemon.path("vm0.sock").exists());
}

#[test]
fn guest_is_announced_before_its_vmm() {
    let daemon = Daemon::start();
    let path = daemon.path("vm0.sock");
    let (connected, wait) = channel();
    let (connected, wait) = (Mutex::new(connected), Mutex::new(wait));
    let (told_early, early) = channel();
    let told_early = Mutex::new(told_early);
    let vmm = path.clone();
    daemon.registry.subscribe(Box::new(move |event| match event {
        RegistryEvent::GuestAdded { .. } => {
            // A VMM that was faster than the announcement.
            let stream = UnixStream::connect(&vmm).unwrap();
            let told = wait.lock().unwrap().recv_timeout(Duration::from_millis(50));
            told_early.lock().unwrap().send((told, stream)).unwrap();
        }
        RegistryEvent::GuestConnected { .. } => connected.lock().unwrap().send(()).unwrap(),
        _ => {}
    }));
    assert!(daemon.registry.add(spec("vm0", &path)).unwrap());
    let (told, _vmm) = early.recv().unwrap();
    assert_eq!(told, Err(RecvTimeoutError::Timeout));
    assert_eq!(daemon.event(), RegistryEvent::GuestAdded { name: "vm0".into() });
    assert_eq!(daemon.event(), RegistryEvent::GuestConnected { name: "vm0".into() });
}

/// How many times this process has a folder open.
fn times_open(folder: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    // One that is closed meanwhile leads nowhere.
    open.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|place| place == folder)).count()
}

#[test]
fn folder_that_others_hold_holds_up_nobody_but_who_adds_a_guest_there() {
    // Whoever waits for the folder gives up after a while, which on a slow machine may be before it is let go.
    for _ in 0..5 {
        let daemon = Daemon::start();
        daemon.add("vm0");
        let folder = fs::File::open(daemon.dir.path()).unwrap();
        flock(&folder, FlockOperation::LockExclusive).unwrap();
        let added = std::thread::scope(|scope| {
            let (registry, wanted) = (&daemon.registry, spec("vm1", &daemon.path("vm1.sock")));
            let adding = scope.spawn(move || registry.add(wanted));
            while times_open(daemon.dir.path()) < 2 && !adding.is_finished() {
                std::thread::yield_now();
            }
            let there: Vec<_> = daemon.registry.list().into_iter().map(|guest| guest.name).collect();
            assert_eq!(there, ["vm0"]);
            assert!(!daemon.registry.add(spec("vm0", &daemon.path("vm0.sock"))).unwrap());
            flock(&folder, FlockOperation::Unlock).unwrap();
            adding.join().unwrap()
        });
        match added {
            Ok(added) => return assert!(added),
            Err(error) => assert!(matches!(error, AddError::Io { .. }), "{error}"),
        }
    }
    panic!("who lists guests waits for the folder too");
}

#[test]
fn same_guest_that_is_added_by_many_at_once_is_added_once() {
    let daemon = Daemon::start();
    let (path, together) = (daemon.path("vm0.sock"), Barrier::new(8));
    let added = std::thread::scope(|scope| {
        let (registry, together) = (&daemon.registry, &together);
        let adding = [(); 8].map(|()| {
            let wanted = spec("vm0", &path);
            scope.spawn(move || {
                together.wait();
                registry.add(wanted).unwrap()
            })
        });
        adding.map(|adding| adding.join().unwrap())
    });
    assert_eq!(added.iter().filter(|added| **added).count(), 1);
    assert!(!Vmm::start(&path).command(&[0; 24]).is_empty());
}

#[test]
fn socket_of_another_program_that_takes_nobody_more_is_not_waited_for() {
    let daemon = Daemon::start();
    let path = daemon.path("vm0.sock");
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let address = SocketAddrUnix::new(&path).unwrap();
    let other = socket();
    bind(&other, &address).unwrap();
    listen(&other, 0).unwrap();
    let mut waiting = Vec::new();
    let full = loop {
        let next = socket();
        match connect(&next, &address) {
            Ok(()) => waiting.push(next),
            Err(error) => break error,
        }
    };
    assert_eq!(full, Errno::AGAIN);
    let (tell, told) = channel();
    let registry = std::sync::Arc::clone(&daemon.registry);
    let wanted = spec("vm0", &path);
    std::thread::spawn(move || tell.send(registry.add(wanted)));
    let refused = told.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(refused, Err(AddError::SocketInUse(_))), "{refused:?}");
    assert!(path.exists());
}

#[test]
fn live_socket_of_another_program_is_left_alone() {
    let daemon = Daemon::start();
    let path = daemon.path("vm0.sock");
    let other = UnixListener::bind(&path).unwrap();
    assert!(matches!(daemon.registry.add(spec("vm0", &path)), Err(AddError::SocketInUse(_))));
    assert!(path.exists());
    drop(other);
    assert!(daemon.registry.add(spec("vm0", &path)).unwrap());
}

#[test]
fn files_that_are_no_sockets_are_left_alone() {
    let daemon = Daemon::start();
    let path = daemon.path("vm0.sock");
    let refused =
        |path: &Path| matches!(daemon.registry.add(spec("vm0", path)), Err(AddError::SocketInUse(_)));
    fs::write(&path, "precious").unwrap();
    assert!(refused(&path));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    std::os::unix::fs::symlink("nowhere", daemon.path("link.sock")).unwrap();
    assert!(refused(&daemon.path("link.sock")));
    fs::create_dir(daemon.path("dir.sock")).unwrap();
    assert!(refused(&daemon.path("dir.sock")));
}

#[test]
fn socket_is_for_its_owner_only() {
    let daemon = Daemon::start();
    let meta = fs::symlink_metadata(daemon.add("vm0")).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
}

#[test]
fn socket_that_was_replaced_is_not_removed() {
    let daemon = Daemon::start();
    let path = daemon.add("vm0");
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    assert!(daemon.registry.remove("vm0"));
    assert!(path.exists());
    drop(other);
}
