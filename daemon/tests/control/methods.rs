//! Methods: discovery, strictness of parameters, guests.

use crate::device::{BROKEN, Idle};
use crate::harness::Server;
use daemon::control::Options;
use daemon::control::methods::METHODS;
use serde_json::{Value, json};
use std::path::Path;

/// Everything about the daemon that a method could have changed.
fn state(server: &Server) -> (Value, Vec<String>) {
    let guests = server.client().result("guest.list", json!({}));
    let mut files: Vec<String> = std::fs::read_dir(server.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    (guests, files)
}

#[test]
fn discover_lists_every_method_with_its_parameters() {
    let server = Server::start();
    let document = server.client().result("rpc.discover", json!({}));
    let told = document["methods"].as_array().unwrap();
    assert_eq!(told.len(), METHODS.len());
    for (told, method) in told.iter().zip(METHODS) {
        assert_eq!(told["name"], method.name);
        let names: Vec<&str> =
            told["params"].as_array().unwrap().iter().map(|param| param["name"].as_str().unwrap()).collect();
        assert_eq!(names, method.params.iter().map(|param| param.name).collect::<Vec<_>>());
        assert!(told["params"].as_array().unwrap().iter().all(|param| param["schema"].is_object()));
    }
    let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
    let expected = [
        "context.evict",
        "context.get",
        "context.list",
        "device.ledger",
        "device.list",
        "events.subscribe",
        "fault.recent",
        "guest.add",
        "guest.get",
        "guest.list",
        "guest.remove",
        "rpc.discover",
        "server.info",
        "shutdown",
        "stats.get",
    ];
    assert_eq!(names, expected);
}

#[test]
fn wrong_parameters_refused_by_every_method_without_effect() {
    let server = Server::start();
    let mut client = server.client();
    client.result("guest.add", json!({"name": "here", "socket": server.guest_socket("here.sock")}));
    let before = state(&server);
    let right = json!({
        "name": "here", "guest": "here", "socket": server.guest_socket("new.sock"), "ctx_id": 1, "device": 0,
        "devices": [], "kinds": ["guest.added"], "limit": 1,
    });
    for method in METHODS {
        let good: serde_json::Map<String, Value> =
            method.params.iter().map(|param| (param.name.to_owned(), right[param.name].clone())).collect();
        let mut bad = vec![{
            let mut unknown = good.clone();
            unknown.insert("no such parameter".into(), json!(1));
            unknown
        }];
        for param in method.params {
            let mut wrong = good.clone();
            wrong.insert(param.name.to_owned(), json!({"of": "a wrong type"}));
            bad.push(wrong);
            if param.required {
                let mut missing = good.clone();
                missing.remove(param.name);
                bad.push(missing);
            }
        }
        for params in bad {
            let refused = client.error(method.name, params.clone().into());
            assert_eq!(refused, (-32602, "invalid-params".into()), "{} {params:?}", method.name);
        }
    }
    assert_eq!(state(&server), before);
}

#[test]
fn info_names_daemon_and_protocol() {
    let server = Server::start();
    let info = server.client().result("server.info", json!({}));
    assert_eq!(info["name"], "svmd");
    assert_eq!(info["pid"], std::process::id());
    assert_eq!(info["protocol"]["virtio_device_id"], 16);
    assert_eq!(info["protocol"]["capset_id"], 24);
    assert_eq!(info["guests"], 0);
    assert!(info["uptime_s"].is_u64());
}

#[test]
fn guest_add_and_remove_are_idempotent() {
    let server = Server::start();
    let mut client = server.client();
    let guest = json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")});
    assert_eq!(client.result("guest.add", guest.clone()), json!({"created": true}));
    assert_eq!(client.result("guest.add", guest), json!({"created": false}));
    let entry = client.result("guest.get", json!({"name": "vm0"}));
    assert_eq!(entry["socket"], server.guest_socket("vm0.sock"));
    assert_eq!(entry["connected"], false);
    assert_eq!(entry["status"], Value::Null);
    assert_eq!(client.result("guest.list", json!({})), json!({"guests": [entry]}));
    assert_eq!(client.result("guest.remove", json!({"name": "vm0"})), json!({"removed": true}));
    assert_eq!(client.result("guest.remove", json!({"name": "vm0"})), json!({"removed": false}));
    assert!(!Path::new(&server.guest_socket("vm0.sock")).exists());
}

#[test]
fn guest_add_refusals_have_kinds_and_no_effect() {
    let server = Server::start();
    let mut client = server.client();
    let socket = server.guest_socket("vm0.sock");
    let file = server.guest_socket("file");
    std::fs::write(&file, "precious").unwrap();
    client.result("guest.add", json!({"name": "vm0", "socket": socket}));
    let before = state(&server);
    let other = server.guest_socket("other.sock");
    let cases = [
        (json!({"name": "vm0", "socket": other}), "name-taken"),
        (json!({"name": "a/b", "socket": other}), "bad-name"),
        (json!({"name": "x".repeat(65), "socket": other}), "bad-name"),
        (json!({"name": "vm1", "socket": socket}), "socket-in-use"),
        (json!({"name": "vm1", "socket": file}), "socket-in-use"),
        (json!({"name": "vm1", "socket": "/nowhere/vm1.sock"}), "socket-outside-runtime-dirs"),
        (json!({"name": "vm1", "socket": other, "devices": ["no such device"]}), "unknown-device"),
    ];
    for (params, kind) in cases {
        assert_eq!(client.error("guest.add", params.clone()), (-32000, kind.into()), "{params}");
    }
    assert_eq!(state(&server), before);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
}

#[test]
fn unknown_objects_have_kinds() {
    let server = Server::start();
    let mut client = server.client();
    client.result("guest.add", json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
    let cases = [
        ("guest.get", json!({"name": "x"}), "guest-not-found"),
        ("context.list", json!({"guest": "x"}), "guest-not-found"),
        ("context.get", json!({"guest": "x", "ctx_id": 1}), "guest-not-found"),
        ("context.evict", json!({"guest": "x", "ctx_id": 1}), "guest-not-found"),
        ("context.get", json!({"guest": "vm0", "ctx_id": 1}), "guest-not-connected"),
        ("context.evict", json!({"guest": "vm0", "ctx_id": 1}), "guest-not-connected"),
        ("device.ledger", json!({"device": u64::MAX}), "unknown-device"),
        ("device.ledger", json!({"device": "no such device"}), "unknown-device"),
    ];
    for (method, params, kind) in cases {
        assert_eq!(client.error(method, params.clone()), (-32000, kind.into()), "{method} {params}");
    }
    assert_eq!(client.result("context.list", json!({"guest": "vm0"})), json!({"contexts": []}));
    assert_eq!(client.result("fault.recent", json!({})), json!({"faults": []}));
}

#[test]
fn panic_of_a_method_costs_its_request_only() {
    let server = Server::start_on(vec![Idle::start(BROKEN, Vec::new())], Options::default());
    let mut client = server.client();
    assert_eq!(client.error("device.ledger", json!({"device": 0})), (-32603, "internal".into()));
    assert_eq!(client.result("device.list", json!({}))["devices"][0]["name"], BROKEN);
}

#[test]
fn shutdown_answers_and_then_ends() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.result("shutdown", json!({})), json!({}));
    server.wait_for_shutdown();
    assert_eq!(client.try_line(), None);
}
