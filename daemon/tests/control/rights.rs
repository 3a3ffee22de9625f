//! Who may connect, and what a read-only socket lets them do.

use crate::harness::{Client, PATIENCE, Server, error_of};
use daemon::control::methods::{METHODS, Rights};
use daemon::control::{Options, Users};
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};
use std::fs::{Permissions, metadata, set_permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn read_only() -> Server {
    Server::start_with(Options { rights: Rights::ReadOnly, ..Options::default() })
}

fn svmctl(socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_svmctl"));
    command.arg("--socket").arg(socket).args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn read_only_socket_refuses_what_changes_before_it_looks_at_parameters() {
    let server = read_only();
    let mut client = server.client();
    let refused: Vec<&str> = METHODS
        .iter()
        .map(|method| method.name)
        .filter(|name| client.call(name, json!({}))["error"]["data"]["kind"] == "read-only")
        .collect();
    assert_eq!(refused, ["context.evict", "device.ledger", "guest.add", "guest.remove", "shutdown"]);
    let add = json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")});
    assert_eq!(client.error("guest.add", add.clone()), (-32000, "read-only".into()));
    let batch = json!([{"jsonrpc": "2.0", "id": 1, "method": "guest.add", "params": add},
        {"jsonrpc": "2.0", "method": "shutdown"}]);
    client.send(format!("{batch}\n"));
    assert_eq!(error_of(&client.line()[0]).1, "read-only");
    assert_eq!(client.result("guest.list", json!({})), json!({"guests": []}));
    let told = client.result("rpc.discover", json!({}));
    for (told, method) in told["methods"].as_array().unwrap().iter().zip(METHODS) {
        assert_eq!(told["x-read-only"], method.rights == Rights::ReadOnly);
    }
}

#[test]
fn read_only_socket_tells_events_and_serves_svmctl() {
    let server = read_only();
    let mut watcher = server.client();
    watcher.result("events.subscribe", json!({}));
    let socket = daemon::registry::Endpoint::Path(server.guest_socket("vm0.sock").into());
    server
        .registry
        .add(daemon::registry::GuestSpec {
            name: "vm0".into(),
            socket,
            devices: None,
            limits: daemon::limits::Overrides::default(),
        })
        .unwrap();
    assert_eq!(watcher.line()["params"]["kind"], "guest.added");
    let listed = svmctl(&server.socket(), &["guests"]);
    assert!(listed.status.success() && String::from_utf8_lossy(&listed.stdout).contains("vm0"));
    for args in [&["guest", "remove", "vm0"][..], &["shutdown"]] {
        let refused = svmctl(&server.socket(), args);
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("[read-only]"), "{refused:?}");
    }
    assert_eq!(server.registry.list().len(), 1);
}

#[test]
fn user_who_may_not_is_told_and_closed() {
    let nobody = || Options { owners: vec![], users: Users::Only(vec![]), ..Options::default() };
    let server = Server::start_with(nobody());
    let mut client = server.client();
    assert_eq!(error_of(&client.line()), (-32000, "not-permitted".into()));
    assert_eq!(client.try_line(), None);
    let refused = svmctl(&server.socket(), &["guests"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("[not-permitted]"), "{refused:?}");

    let me = Users::Only(vec![geteuid().as_raw()]);
    Server::start_with(Options { users: me, ..nobody() }).client().result("stats.get", json!({}));
    Server::start_with(Options { users: Users::All, ..nobody() }).client().result("stats.get", json!({}));
}

#[test]
fn idle_connection_gives_way_and_a_subscriber_does_not() {
    let server =
        Server::start_with(Options { max_connections: 2, idle: Duration::ZERO, ..Options::default() });
    let (mut subscriber, mut slow) = (server.client(), server.client());
    subscriber.result("events.subscribe", json!({}));
    slow.result("stats.get", json!({}));
    // A request that never ends is none.
    slow.send("{");
    let mut third = server.client();
    // What was told before may still be under way when it comes: ask until there is room.
    let deadline = Instant::now() + PATIENCE;
    while third.call_or_refusal()["error"]["data"]["kind"] == "too-many-connections" {
        assert!(Instant::now() < deadline, "nobody gives way");
        third = server.client();
    }
    third.result("events.subscribe", json!({}));
    assert_eq!(error_of(&slow.line()), (-32000, "too-many-connections".into()));
    // What it has sent may be unread, which shows as a reset.
    let end = slow.stream().read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    assert_eq!(error_of(&server.client().line()), (-32000, "too-many-connections".into()));
    subscriber.result("stats.get", json!({}));
}

/// svmd with a control socket that user 4711 may use, and a read-only one, in a folder that everybody may enter.
struct Svmd {
    child: Child,
    dir: TempDir,
}

impl Svmd {
    fn start(ro_mode: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name);
        let text = format!(
            "[daemon]\ncontrol_socket = {:?}\ncontrol_users = [4711]\ncontrol_socket_ro = {:?}\n\
             control_socket_ro_mode = {ro_mode}\nsandbox = 'best-effort'\n",
            path("control.sock"),
            path("ro.sock"),
        );
        std::fs::write(path("svmd.toml"), text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
        let child = command.arg("--config").arg(path("svmd.toml")).stdin(Stdio::null()).spawn().unwrap();
        let mut svmd = Self { child, dir };
        let deadline = Instant::now() + PATIENCE;
        while ["control.sock", "ro.sock"].iter().any(|name| UnixStream::connect(svmd.path(name)).is_err()) {
            assert_eq!(svmd.child.try_wait().unwrap(), None, "svmd ended");
            assert!(Instant::now() < deadline, "svmd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        svmd
    }
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
    fn mode(&self, name: &str) -> u32 {
        metadata(self.path(name)).unwrap().permissions().mode() & 0o777
    }
    /// What user `uid` is answered to `guest.list`.
    fn asked_by(&self, uid: u32, name: &str) -> Result<Value, std::io::ErrorKind> {
        let path = self.path(name);
        let ask = move || {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            let stream = UnixStream::connect(path).map_err(|error| error.kind())?;
            Ok(Client::over(stream).call_or_refusal())
        };
        std::thread::spawn(ask).join().unwrap()
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

#[test]
fn modes_of_sockets_are_those_of_the_configuration_whatever_the_umask() {
    for (ro, mode) in [("0o660", 0o660), ("0o600", 0o600), ("0o666", 0o666)] {
        let svmd = Svmd::start(ro);
        assert_eq!((svmd.mode("control.sock"), svmd.mode("ro.sock")), (0o666, mode));
    }
}

#[test]
fn users_get_what_the_configuration_grants_in_a_confined_daemon() {
    if !geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "other users can be played by root only");
        std::io::stderr().write_all(b"SKIPPED a test of other users: it takes root\n").unwrap();
        return;
    }
    let (open, closed) = (Svmd::start("0o666"), Svmd::start("0o660"));
    let result = |answer: Result<Value, _>| answer.unwrap()["result"].is_object();
    for uid in [0, 4711] {
        assert!(result(open.asked_by(uid, "control.sock")), "{uid}");
    }
    let refused = open.asked_by(4712, "control.sock").unwrap();
    assert_eq!(error_of(&refused).1, "not-permitted");
    assert!(result(open.asked_by(4712, "ro.sock")));
    assert!(result(closed.asked_by(0, "ro.sock")));
    assert_eq!(closed.asked_by(4712, "ro.sock"), Err(std::io::ErrorKind::PermissionDenied));
}
