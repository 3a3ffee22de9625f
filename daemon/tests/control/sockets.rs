//! Where sockets may be made: paths that lead elsewhere, and what is there already.

use crate::harness::{PATIENCE, Server};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Names of what is in a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn paths_that_lead_out_of_the_runtime_folder_make_nothing() {
    let (server, outside) = (Server::start(), tempfile::tempdir().unwrap());
    let (inside, elsewhere) = (server.dir().to_owned(), outside.path().to_owned());
    fs::create_dir(inside.join("sub")).unwrap();
    symlink(&elsewhere, inside.join("link")).unwrap();
    symlink(elsewhere.join("target.sock"), inside.join("dangling.sock")).unwrap();
    drop(UnixListener::bind(elsewhere.join("dead.sock")).unwrap());
    symlink(elsewhere.join("dead.sock"), inside.join("to-dead.sock")).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let below = |name: &str| text(&inside.join(name));
    let back = format!("{}/../{}/x.sock", text(&inside), elsewhere.file_name().unwrap().to_str().unwrap());
    let (before, before_outside) = (names(&inside), names(&elsewhere));
    let cases = [
        (below("link/x.sock"), "socket-outside-runtime-dirs"),
        (below("link/../x.sock"), "socket-outside-runtime-dirs"),
        (back, "socket-outside-runtime-dirs"),
        (below(".."), "socket-outside-runtime-dirs"),
        ("/".to_owned(), "socket-outside-runtime-dirs"),
        ("x.sock".to_owned(), "socket-outside-runtime-dirs"),
        (text(&elsewhere.join("x.sock")), "socket-outside-runtime-dirs"),
        (below("dangling.sock"), "socket-in-use"),
        (below("to-dead.sock"), "socket-in-use"),
        (below("sub"), "socket-in-use"),
        (below("control.sock"), "socket-in-use"),
        (below("missing/x.sock"), "socket-failed"),
        (below(&"x".repeat(108)), "socket-failed"),
        (below(&"x".repeat(300)), "socket-failed"),
    ];
    let mut client = server.client();
    for (path, kind) in cases {
        let refused = client.error("guest.add", json!({"name": "vm0", "socket": path}));
        assert_eq!(refused, (-32000, kind.into()), "{path}");
    }
    assert_eq!((names(&inside), names(&elsewhere)), (before, before_outside));
    client.result("guest.add", json!({"name": "vm0", "socket": below("sub/../x.sock")}));
    assert!(inside.join("x.sock").exists());
}

/// svmd, told to make its control socket at `path`; it must not run.
fn refused_at(option: &str, path: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
    command.arg(format!("{option}={}", path.display())).arg("--runtime-dir").arg(path.parent().unwrap());
    let other = path.with_file_name("other.sock");
    if option == "--control-socket-ro" {
        command.arg("--control-socket").arg(&other);
    }
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    assert!(!other.exists(), "a refused start leaves no socket");
    output
}

#[test]
fn control_socket_takes_no_place_of_anything_that_lives_or_is_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), "precious").unwrap();
    let _live = UnixListener::bind(path("live")).unwrap();
    drop(UnixListener::bind(path("dead")).unwrap());
    symlink(path("dead"), path("link")).unwrap();
    for option in ["--control-socket", "--control-socket-ro"] {
        for name in ["file", "live", "link"] {
            let output = refused_at(option, &path(name));
            assert_eq!(output.status.code(), Some(1), "{option} {name}");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(text.contains("in use") && text.contains(name), "{text}");
        }
    }
    assert_eq!(names(dir.path()), ["dead", "file", "link", "live"]);
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "precious");
    assert!(UnixStream::connect(path("live")).is_ok());
    let same = Command::new(env!("CARGO_BIN_EXE_svmd"))
        .args(["--control-socket", "same.sock", "--control-socket-ro", "same.sock"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(same.status.code(), Some(2), "{same:?}");
}
