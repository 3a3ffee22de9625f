//! events.subscribe over the socket.

use crate::harness::{Client, Server};
use daemon::control::Options;
use serde_json::{Value, json};
use std::time::Duration;

fn event(client: &mut Client) -> Value {
    let notification = client.line();
    assert_eq!(notification["method"], "event");
    assert!(notification.get("id").is_none());
    notification["params"].clone()
}

#[test]
fn subscriber_sees_guests_come_and_go() {
    let server = Server::start();
    let mut watcher = server.client();
    let mut operator = server.client();
    let subscribed = watcher.result("events.subscribe", json!({}));
    assert_eq!(subscribed["last_seq"], 0);
    operator.result("guest.add", json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
    operator.result("guest.remove", json!({"name": "vm0"}));
    assert_eq!(event(&mut watcher), json!({"kind": "guest.added", "seq": 1, "guest": "vm0"}));
    assert_eq!(event(&mut watcher), json!({"kind": "guest.removed", "seq": 2, "guest": "vm0"}));
}

#[test]
fn subscribing_again_replaces_the_kinds() {
    let server = Server::start();
    let mut client = server.client();
    client.result("events.subscribe", json!({}));
    let subscribed = client.result("events.subscribe", json!({"kinds": ["guest.removed"]}));
    assert_eq!(subscribed["kinds"], json!(["guest.removed"]));
    client.result("guest.add", json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
    client.send("{\"jsonrpc\":\"2.0\",\"method\":\"guest.remove\",\"params\":{\"name\":\"vm0\"}}\n");
    assert_eq!(event(&mut client)["kind"], "guest.removed");
}

#[test]
fn subscriber_still_gets_answers() {
    let server = Server::start();
    let mut client = server.client();
    client.result("events.subscribe", json!({}));
    client.result("stats.get", json!({}));
}

#[test]
fn subscriber_that_does_not_read_holds_nobody_up_and_learns_of_the_gap() {
    // However slow this machine is, the watcher must not be cut off before it begins to read.
    let server = Server::start_with(Options { stall: Duration::from_secs(3600), ..Options::default() });
    let mut watcher = server.client();
    let mut operator = server.client();
    watcher.result("events.subscribe", json!({}));
    // More than the server's ring and the sockets' buffers hold.
    let (add, remove) = ("guest.add", "guest.remove");
    for _ in 0..4000 {
        operator.result(add, json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
        operator.result(remove, json!({"name": "vm0"}));
    }
    let (mut last_seq, mut missed) = (0, 0);
    while last_seq < 8000 {
        let event = event(&mut watcher);
        let seq = event["seq"].as_u64().unwrap();
        let step = event["missed"].as_u64().unwrap_or(1);
        assert_eq!(seq, last_seq + step, "every event is either told or counted as missed");
        missed += event["missed"].as_u64().unwrap_or(0);
        last_seq = seq;
    }
    assert!(missed > 0);
}
