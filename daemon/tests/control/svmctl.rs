//! svmctl as a process: exit status, JSON and text.

use crate::harness::Server;
use daemon::limits::Limits;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn svmctl(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_svmctl"))
        .env_remove("SVMD_SOCKET")
        .arg("--socket")
        .arg(socket)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json_of(server: &Server, args: &[&str]) -> Value {
    let text = stdout(&svmctl(&server.socket(), &[&["--json"], args].concat()));
    assert_eq!(text.matches('\n').count(), 1, "one line: {text}");
    serde_json::from_str(&text).unwrap()
}

/// Exit status and standard error of a command that must fail.
fn failure(output: &Output) -> (i32, String) {
    assert!(output.stdout.is_empty(), "{output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr.clone()).unwrap())
}

#[test]
fn json_results_are_those_of_the_methods() {
    let server = Server::start();
    let socket = server.guest_socket("vm0.sock");
    assert_eq!(json_of(&server, &["guest", "add", "vm0", &socket]), json!({"created": true}));
    assert_eq!(json_of(&server, &["guest", "add", "vm0", &socket]), json!({"created": false}));
    assert_eq!(json_of(&server, &["guest", "show", "vm0"])["socket"], socket);
    assert_eq!(json_of(&server, &["guests"])["guests"][0]["name"], "vm0");
    assert_eq!(json_of(&server, &["info"])["name"], "svmd");
    assert_eq!(json_of(&server, &["devices"]), json!({"devices": []}));
    assert_eq!(json_of(&server, &["contexts", "--guest", "vm0"]), json!({"contexts": []}));
    assert_eq!(json_of(&server, &["faults", "--limit", "5"]), json!({"faults": []}));
    assert_eq!(json_of(&server, &["stats"])["counters"]["faults_raised"], 0);
    assert_eq!(json_of(&server, &["discover"])["openrpc"], "1.3.2");
    assert_eq!(json_of(&server, &["raw", "guest.get", r#"{"name":"vm0"}"#])["name"], "vm0");
    assert_eq!(json_of(&server, &["guest", "remove", "vm0"]), json!({"removed": true}));
    assert_eq!(json_of(&server, &["guest", "remove", "vm0"]), json!({"removed": false}));
    assert_eq!(json_of(&server, &["shutdown"]), json!({}));
    server.wait_for_shutdown();
}

#[test]
fn tables_name_what_there_is() {
    let server = Server::start();
    let socket = server.guest_socket("vm0.sock");
    let run = |args: &[&str]| stdout(&svmctl(&server.socket(), args));
    assert!(run(&["guests"]).contains("svmctl guest add"));
    assert!(run(&["guest", "add", "vm0", &socket]).contains(&socket));
    let guests = run(&["guests"]);
    let lines: Vec<&str> = guests.lines().collect();
    assert_eq!(lines.len(), 2, "{guests}");
    assert!(lines[0].starts_with("name  vmm "));
    assert!(lines[1].starts_with("vm0   absent "));
    assert!(run(&["guest", "show", "vm0"]).contains("vmm         absent"));
    assert!(run(&["info"]).starts_with("daemon    svmd "));
    assert!(run(&["contexts"]).contains("no contexts"));
    assert!(run(&["stats"]).contains("all counters are 0"));
    assert!(run(&["discover"]).contains("guest.add name socket [devices]"));
}

#[test]
fn limits_of_a_guest_without_a_vmm_are_shown() {
    let server = Server::start();
    let socket = server.guest_socket("vm0.sock");
    let add = ["guest", "add", "vm0", &socket, "--limit", "contexts=2", "--limit", "table_bytes=2097152"];
    let add = [&add[..], &["--limit", "busy_poll_us=0"]].concat();
    stdout(&svmctl(&server.socket(), &add));
    let shown = stdout(&svmctl(&server.socket(), &["guest", "show", "vm0"]));
    let row = |name: &str| -> Vec<String> {
        let mut table = shown.lines().skip_while(|line| !line.starts_with("limit "));
        let line = table.find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in {shown}")).split_whitespace().map(str::to_owned).collect()
    };
    for (name, ..) in Limits::BOUNDS {
        assert_eq!(row(name)[0], name);
    }
    assert_eq!(row("contexts "), ["contexts", "guest", "0", "0", "2", "0"]);
    assert_eq!(row("table_bytes"), ["table_bytes", "guest", "0", "B", "0", "B", "2", "MiB", "0"]);
    assert_eq!(row("fault_deadline_ms"), ["fault_deadline_ms", "fault", "-", "-", "0", "-"]);
    assert_eq!(row("busy_poll_us"), ["busy_poll_us", "empty", "ring", "-", "-", "0", "-"]);
    let entry = json_of(&server, &["guest", "show", "vm0"]);
    let contexts =
        json!({"name": "contexts", "scope": "guest", "used": 0, "peak": 0, "limit": 2, "refused": 0});
    assert_eq!((&entry["limits"][0], &entry["status"]), (&contexts, &Value::Null));
    assert_eq!(entry["limits"].as_array().unwrap().len() + 4, Limits::BOUNDS.len());
}

#[test]
fn refusal_is_status_1_and_names_kind_and_remedy() {
    let server = Server::start();
    let (status, text) = failure(&svmctl(&server.socket(), &["guest", "show", "nobody"]));
    assert_eq!(status, 1);
    assert!(text.contains("[guest-not-found]") && text.contains("guest.list"), "{text}");
    let (status, text) = failure(&svmctl(&server.socket(), &["ledger", "no such device"]));
    assert_eq!(status, 1);
    assert!(text.contains("[unknown-device]"), "{text}");
    assert_eq!(failure(&svmctl(&server.socket(), &["events", "--kind", "x"])).0, 1);
}

#[test]
fn misspelt_limit_is_named() {
    let server = Server::start();
    let socket = server.guest_socket("vm0.sock");
    let refused = |limit: &str| {
        let add = ["guest", "add", "vm0", &socket, "--limit", "jobs=2", "--limit", limit];
        failure(&svmctl(&server.socket(), &add))
    };
    let (status, text) = refused("conexts=2");
    assert_eq!(status, 1);
    assert!(text.contains("\"conexts\": there is no such limit; did you mean contexts?"), "{text}");
    let (status, text) = refused("contexts=0");
    assert_eq!(status, 1);
    assert!(text.contains("\"contexts\": 0 is not in 1..="), "{text}");
    assert_eq!(json_of(&server, &["guests"]), json!({"guests": []}));
}

#[test]
fn wrong_command_line_is_status_2_before_anything_is_sent() {
    let nowhere = Path::new("/nonexistent/control.sock");
    for args in [
        &["no-such-command"][..],
        &["guest", "add", "vm0"],
        &["context", "show", "vm0", "-1"],
        &["faults", "--limit", "0"],
        &["raw", "guest.get", "[1]"],
        &["raw", "guest.get", "{"],
    ] {
        assert_eq!(failure(&svmctl(nowhere, args)).0, 2, "{args:?}");
    }
}

#[test]
fn unreachable_daemon_is_status_3_and_says_what_to_look_at() {
    let dir = tempfile::tempdir().unwrap();
    let (status, text) = failure(&svmctl(&dir.path().join("none.sock"), &["info"]));
    assert_eq!(status, 3);
    assert!(text.contains("is svmd running"), "{text}");
    let dead = dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let (status, text) = failure(&svmctl(&dead, &["info"]));
    assert_eq!(status, 3);
    assert!(text.contains("nobody listens"), "{text}");
}

#[test]
fn socket_of_the_environment_is_used() {
    let server = Server::start();
    let output = Command::new(env!("CARGO_BIN_EXE_svmctl"))
        .env("SVMD_SOCKET", server.socket())
        .arg("stats")
        .output()
        .unwrap();
    assert!(stdout(&output).contains("guests connected"));
}

#[test]
fn help_of_every_command_explains() {
    let commands: [&[&str]; 18] = [
        &[],
        &["info"],
        &["devices"],
        &["guests"],
        &["guest"],
        &["guest", "add"],
        &["guest", "remove"],
        &["guest", "show"],
        &["contexts"],
        &["context"],
        &["context", "show"],
        &["context", "evict"],
        &["faults"],
        &["stats"],
        &["events"],
        &["ledger"],
        &["discover"],
        &["raw"],
    ];
    for command in commands {
        let help = stdout(&svmctl(Path::new("unused"), &[command, &["--help"]].concat()));
        assert!(help.contains("--socket <PATH>") && help.contains("--json"), "{help}");
    }
}

#[test]
fn events_are_printed_as_they_come_until_the_daemon_ends() {
    let server = Server::start();
    let mut watcher = Command::new(env!("CARGO_BIN_EXE_svmctl"))
        .arg("--socket")
        .arg(server.socket())
        .args(["--json", "events", "--kind", "guest.added"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Guests come and go until the watcher has surely subscribed and printed one.
    let mut printed = std::io::BufReader::new(watcher.stdout.take().unwrap());
    let (seen, was_seen) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut printed, &mut line).unwrap();
        seen.send(line).unwrap();
        std::io::read_to_string(printed).unwrap()
    });
    let mut operator = server.client();
    let line = loop {
        operator.result("guest.add", json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
        operator.result("guest.remove", json!({"name": "vm0"}));
        if let Ok(line) = was_seen.try_recv() {
            break line;
        }
    };
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["kind"], "guest.added");
    assert_eq!(event["guest"], "vm0");
    operator.result("shutdown", json!({}));
    server.wait_for_shutdown();
    reader.join().unwrap();
    assert_eq!(watcher.wait().unwrap().code(), Some(0));
}
