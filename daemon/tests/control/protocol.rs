//! Framing and JSON-RPC: what is a request, and what becomes of what is none.

use crate::harness::{Server, error_of};
use daemon::control::Options;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

const MAX_LINE: usize = 64 << 10;
const MAX_DEPTH: usize = 16;

/// A request that is valid and exactly `length` bytes long.
fn padded_request(length: usize) -> String {
    let request =
        |pad: usize| format!(r#"{{"jsonrpc":"2.0","method":"stats.get","id":"{}"}}"#, "x".repeat(pad));
    request(length - request(0).len())
}

fn nested(depth: usize) -> String {
    let (open, close) = ("[".repeat(depth), "]".repeat(depth));
    format!(r#"{{"jsonrpc":"2.0","method":"guest.get","params":{{"name":{open}{close}}},"id":1}}"#)
}

#[test]
fn bad_lines_get_their_code_and_leave_the_connection() {
    let server = Server::start();
    let mut client = server.client();
    let cases: &[(&[u8], i64, &str, Value)] = &[
        (b"", -32700, "parse-error", Value::Null),
        (b"{", -32700, "parse-error", Value::Null),
        (b"nonsense", -32700, "parse-error", Value::Null),
        (b"{} {}", -32700, "parse-error", Value::Null),
        (b"\xff\xfe", -32700, "parse-error", Value::Null),
        (
            b"{\"jsonrpc\":\"2.0\",\"method\":\"stats.get\",\"id\":\"\xc3\x28\"}",
            -32700,
            "parse-error",
            Value::Null,
        ),
        (br#"{"jsonrpc":"2.0","method":"stats.get","id":1e999}"#, -32700, "parse-error", Value::Null),
        (
            br#"{"jsonrpc":"2.0","method":"stats.get","method":"shutdown","id":1}"#,
            -32700,
            "parse-error",
            Value::Null,
        ),
        (
            br#"{"jsonrpc":"2.0","method":"guest.get","params":{"name":"a","n\u0061me":"b"},"id":1}"#,
            -32700,
            "parse-error",
            Value::Null,
        ),
        (
            br#"{"jsonrpc":"2.0","method":"stats.get","id":18446744073709551616}"#,
            -32600,
            "invalid-request",
            Value::Null,
        ),
        (b"1", -32600, "invalid-request", Value::Null),
        (b"null", -32600, "invalid-request", Value::Null),
        (b"\"stats.get\"", -32600, "invalid-request", Value::Null),
        (b"[]", -32600, "invalid-request", Value::Null),
        (b"{}", -32600, "invalid-request", Value::Null),
        (br#"{"method":"stats.get","id":1}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":"1.0","method":"stats.get","id":1}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":2.0,"method":"stats.get","id":1}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":"2.0","id":1}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":"2.0","method":7,"id":1}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":"2.0","method":7}"#, -32600, "invalid-request", Value::Null),
        (br#"{"jsonrpc":"2.0","method":"stats.get","id":[]}"#, -32600, "invalid-request", Value::Null),
        (
            br#"{"jsonrpc":"2.0","method":"stats.get","id":1,"params":"x"}"#,
            -32600,
            "invalid-request",
            json!(1),
        ),
        (
            br#"{"jsonrpc":"2.0","method":"stats.get","id":1,"params":null}"#,
            -32600,
            "invalid-request",
            json!(1),
        ),
        (br#"{"jsonrpc":"2.0","method":"stats.get","id":1,"parms":{}}"#, -32600, "invalid-request", json!(1)),
        (br#"{"jsonrpc":"2.0","method":"stats.get","id":1,"params":[]}"#, -32602, "invalid-params", json!(1)),
        (
            br#"{"jsonrpc":"2.0","method":"stats.get","id":1,"params":{"x":1}}"#,
            -32602,
            "invalid-params",
            json!(1),
        ),
        (br#"{"jsonrpc":"2.0","method":"Stats.get","id":1}"#, -32601, "unknown-method", json!(1)),
        (br#"{"jsonrpc":"2.0","method":"","id":1,"params":{"x":1}}"#, -32601, "unknown-method", json!(1)),
    ];
    for (line, code, kind, id) in cases {
        client.send([line, b"\n" as &[u8]].concat());
        let response = client.line();
        let told = String::from_utf8_lossy(line);
        assert_eq!(error_of(&response), (*code, (*kind).to_owned()), "{told}");
        assert_eq!(response["id"], *id, "{told}");
    }
    client.result("stats.get", json!({}));
}

#[test]
fn ids_come_back_as_they_were() {
    let server = Server::start();
    let mut client = server.client();
    for id in [json!(0), json!(u64::MAX), json!(i64::MIN), json!(""), json!("a\"\\\u{1}b"), Value::Null] {
        client.send(format!("{}\n", json!({"jsonrpc": "2.0", "method": "stats.get", "id": id})));
        assert_eq!(client.line()["id"], id);
    }
}

#[test]
fn line_at_the_limit_accepted_and_one_byte_more_refused_once() {
    let server = Server::start();
    let mut client = server.client();
    client.send(padded_request(MAX_LINE) + "\n");
    assert!(client.line()["result"].is_object());
    client.send(padded_request(MAX_LINE + 1) + "\n");
    assert_eq!(error_of(&client.line()), (-32600, "line-too-long".into()));
    client.result("stats.get", json!({}));
}

#[test]
fn huge_line_refused_before_its_end_and_skipped() {
    let server = Server::start();
    let mut client = server.client();
    client.send("x".repeat(5 * MAX_LINE));
    assert_eq!(error_of(&client.line()), (-32600, "line-too-long".into()));
    client.send("y".repeat(5 * MAX_LINE) + "\n");
    client.result("stats.get", json!({}));
}

#[test]
fn nesting_is_bounded() {
    let server = Server::start();
    let mut client = server.client();
    // The request and its parameters are two.
    client.send(nested(MAX_DEPTH - 2) + "\n");
    assert_eq!(error_of(&client.line()), (-32602, "invalid-params".into()));
    for depth in [MAX_DEPTH - 1, 30_000] {
        client.send(nested(depth) + "\n");
        assert_eq!(error_of(&client.line()), (-32700, "parse-error".into()));
    }
    client.result("stats.get", json!({}));
}

#[test]
fn request_in_single_bytes_is_one_request() {
    let server = Server::start();
    let mut client = server.client();
    for byte in b"{\"jsonrpc\":\"2.0\",\"method\":\"stats.get\",\"id\":5}\r\n" {
        client.send([*byte]);
    }
    assert_eq!(client.line()["id"], 5);
}

#[test]
fn requests_in_one_write_are_answered_in_order() {
    let server = Server::start();
    let mut client = server.client();
    let request = |id: u32| format!("{}\n", json!({"jsonrpc": "2.0", "method": "stats.get", "id": id}));
    let last = request(100);
    // The last one arrives in two pieces, the first of them in the same write as all others.
    let (head, tail) = last.split_at(10);
    client.send((0..100).map(request).collect::<String>() + head);
    client.send(tail);
    for id in 0..=100 {
        assert_eq!(client.line()["id"], id);
    }
}

#[test]
fn number_as_long_as_a_line_is_refused() {
    let server = Server::start();
    let mut client = server.client();
    let digits = "9".repeat(MAX_LINE - 100);
    client.send(format!("{{\"jsonrpc\":\"2.0\",\"method\":\"stats.get\",\"id\":{digits}}}\n"));
    assert_eq!(error_of(&client.line()), (-32700, "parse-error".into()));
    client.result("stats.get", json!({}));
}

#[test]
fn half_closed_client_gets_its_answers() {
    let server = Server::start();
    let mut client = server.client();
    let request = |id: u32| format!("{}\n", json!({"jsonrpc": "2.0", "method": "stats.get", "id": id}));
    client.send((0..50).map(request).collect::<String>());
    client.stream().shutdown(Shutdown::Write).unwrap();
    for id in 0..50 {
        assert_eq!(client.line()["id"], id);
    }
    assert_eq!(client.try_line(), None);
}

#[test]
fn unended_line_is_no_request() {
    let server = Server::start();
    let mut client = server.client();
    let socket = server.guest_socket("a.sock");
    let add =
        json!({"jsonrpc": "2.0", "id": 1, "method": "guest.add", "params": {"name": "a", "socket": socket}});
    client.send(add.to_string());
    client.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.try_line(), None);
    assert_eq!(server.registry.list().len(), 0);
}

#[test]
fn notifications_act_and_are_not_answered() {
    let server = Server::start();
    let mut client = server.client();
    let socket = server.guest_socket("a.sock");
    let notify = |method: &str, params: Value| {
        format!("{}\n", json!({"jsonrpc": "2.0", "method": method, "params": params}))
    };
    client.send(notify("guest.add", json!({"name": "a", "socket": socket})));
    client.send(notify("guest.get", json!({"name": "nobody"})));
    client.send(notify("guest.get", json!([])));
    client.send(notify("no.such.method", json!({})));
    let listed = client.result("guest.list", json!({}));
    assert_eq!(listed["guests"][0]["name"], "a");
}

#[test]
fn batch_is_answered_as_one_array() {
    let server = Server::start();
    let mut client = server.client();
    let batch = json!([
        {"jsonrpc": "2.0", "method": "stats.get", "id": "first"},
        {"jsonrpc": "2.0", "method": "stats.get"},
        7,
        {"jsonrpc": "2.0", "method": "no.such.method", "id": 2},
        {"jsonrpc": "2.0", "method": "guest.list", "id": 3, "params": {}},
    ]);
    client.send(format!("{batch}\n"));
    let responses = client.line();
    let ids: Vec<&Value> = responses.as_array().unwrap().iter().map(|response| &response["id"]).collect();
    assert_eq!(ids, [&json!("first"), &Value::Null, &json!(2), &json!(3)]);
    assert_eq!(error_of(&responses[1]).0, -32600);
    assert_eq!(error_of(&responses[2]).0, -32601);
    assert_eq!(responses[3]["result"], json!({"guests": []}));
}

#[test]
fn batch_of_notifications_is_not_answered() {
    let server = Server::start();
    let mut client = server.client();
    client.send("[{\"jsonrpc\":\"2.0\",\"method\":\"stats.get\"},{\"jsonrpc\":\"2.0\",\"method\":\"x\"}]\n");
    client.result("stats.get", json!({}));
}

#[test]
fn oversized_batch_refused_whole() {
    let server = Server::start();
    let mut client = server.client();
    let add = json!({"jsonrpc": "2.0", "id": 1, "method": "guest.add",
        "params": {"name": "a", "socket": server.guest_socket("a.sock")}});
    client.send(format!("{}\n", Value::from(vec![add; 129])));
    assert_eq!(error_of(&client.line()), (-32600, "invalid-request".into()));
    assert_eq!(server.registry.list().len(), 0);
}

#[test]
fn connection_beyond_the_limit_is_told_and_a_closed_one_makes_room() {
    let server = Server::start_with(Options { max_connections: 2, ..Options::default() });
    let mut first = server.client();
    let mut second = server.client();
    first.result("stats.get", json!({}));
    second.result("stats.get", json!({}));
    let mut third = server.client();
    assert_eq!(error_of(&third.line()), (-32000, "too-many-connections".into()));
    assert_eq!(third.try_line(), None);
    drop(first);
    // The server learns of the closed connection on its own thread: ask until it has.
    while server.client().call_or_refusal()["error"]["data"]["kind"] == "too-many-connections" {}
    second.result("stats.get", json!({}));
}

#[test]
fn client_that_does_not_read_is_cut_off_and_others_are_served() {
    let server = Server::start_with(Options { stall: Duration::from_millis(100), ..Options::default() });
    let slow = server.client();
    let request = format!("{}\n", json!({"jsonrpc": "2.0", "method": "rpc.discover", "id": 1}));
    // Never reading, until the server gives up on us: then writing fails.
    let cut_off = loop {
        if let Err(error) = slow.stream().write_all(request.as_bytes()) {
            break error;
        }
    };
    assert!(matches!(cut_off.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset));
    server.client().result("stats.get", json!({}));
    // What was sent before is still there, then the stream ends.
    let mut rest = Vec::new();
    let ended = slow.stream().read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    assert!(!rest.is_empty());
}

/// xorshift64*: enough to choose bytes, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32).unwrap() % end
    }
}

#[test]
fn damaged_requests_never_cost_the_connection() {
    let seed = std::env::var("SVM_TEST_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    println!("SVM_TEST_SEED={seed}");
    let mut random = Random(seed | 1);
    let server = Server::start();
    let mut client = server.client();
    let requests = [
        r#"{"jsonrpc":"2.0","method":"guest.get","id":1,"params":{"name":"vm0"}}"#,
        r#"{"jsonrpc":"2.0","method":"context.evict","id":"a","params":{"guest":"vm0","ctx_id":1,"device":0}}"#,
        r#"[{"jsonrpc":"2.0","method":"fault.recent","id":1,"params":{"limit":10}},{"jsonrpc":"2.0"}]"#,
    ];
    for round in 0..2000 {
        let mut line = requests[random.below(requests.len())].as_bytes().to_vec();
        for _ in 0..=random.below(4) {
            let at = random.below(line.len());
            match random.below(3) {
                0 => line[at] = u8::try_from(random.below(256)).unwrap(),
                1 => line.truncate(at.max(1)),
                _ => line.extend_from_within(at..),
            }
        }
        line.push(b'\n');
        client.send(line);
        client.send(format!(
            "{}\n",
            json!({"jsonrpc": "2.0", "method": "stats.get", "id": format!("round {round}")})
        ));
        while client.line()["id"] != format!("round {round}") {}
    }
    assert_eq!(server.registry.list().len(), 0);
}
