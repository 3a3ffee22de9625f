//! Limits that an operator gives, from his command to the refusal; and how many lines of the log others may cause.

use crate::device::{BROKEN, Idle};
use crate::harness::{Client, LIMITS, PATIENCE, Server};
use crate::process::Svmd;
use crate::vmm::Vmm;
use daemon::control::Options;
use daemon::limits::Limits;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use virtio_gpu_svm::protocol::CAPSET_SVM;
use virtio_gpu_svm::protocol::control::SvmResp;
use virtio_gpu_svm::protocol::errno::ENOSPC;
use virtio_gpu_svm::protocol::gpu::{CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE};
use virtio_gpu_svm::protocol::limit::Limit;
use zerocopy::{FromBytes, IntoBytes};

/// Sessions of each guest that ends them by a message that is none.
const NOISE: usize = 20;

/// Makes a context: status and limit of the answer.
fn create_context(vmm: &mut Vmm, ctx_id: u32) -> (i32, Option<Limit>) {
    let create = CtxCreate {
        hdr: CtrlHdr { kind: VIRTIO_GPU_CMD_CTX_CREATE.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() },
        context_init: CAPSET_SVM.into(),
        ..CtxCreate::default()
    };
    let answer = vmm.command(create.as_bytes());
    let (resp, _) = SvmResp::read_from_prefix(&answer).unwrap();
    (resp.status.get(), Limit::from_wire(resp.limit.get()))
}

#[test]
fn context_beyond_a_guests_own_limit_is_refused_by_name() {
    let server = Server::start();
    let socket = server.guest_socket("vm0.sock");
    let added = Command::new(env!("CARGO_BIN_EXE_svmctl"))
        .arg("--socket")
        .arg(server.socket())
        .args(["guest", "add", "vm0", &socket, "--limit", "contexts=2"])
        .output()
        .unwrap();
    assert!(added.status.success(), "{added:?}");
    let mut client = server.client();
    let other = server.guest_socket("vm1.sock");
    client.result("guest.add", json!({"name": "vm1", "socket": other, "limits": {"jobs": 1}}));
    let (mut limited, mut other) = (Vmm::start(Path::new(&socket)), Vmm::start(Path::new(&other)));
    for ctx_id in [1, 2] {
        assert_eq!(create_context(&mut limited, ctx_id), (0, None));
        assert_eq!(create_context(&mut other, ctx_id), (0, None));
    }
    assert_eq!(create_context(&mut limited, 3), (-ENOSPC, Some(Limit::Contexts)));
    assert_eq!(create_context(&mut other, 3), (0, None));
    let row = |client: &mut Client, name: &str| {
        let limits = client.result("guest.get", json!({ "name": name }))["limits"].take();
        limits.as_array().unwrap().iter().find(|row| row["name"] == "contexts").unwrap().clone()
    };
    let counts = |used: u32, limit: u32, refused: u32| {
        json!({
            "name": "contexts", "scope": "guest", "used": used, "peak": used, "limit": limit, "refused": refused,
        })
    };
    assert_eq!(row(&mut client, "vm0"), counts(2, 2, 1));
    assert_eq!(row(&mut client, "vm1"), counts(3, LIMITS.contexts, 0));
}

/// A session that ends with a line of its own in the log.
fn noise(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(&[0xff; 12]).unwrap();
    // The daemon may hang up with bytes unread.
    stream.read_to_end(&mut Vec::new()).ok();
}

#[test]
fn log_of_a_noisy_guest_is_cut_and_says_so_and_its_neighbours_is_not() {
    let mut svmd = Svmd::start_with(|command, dir| {
        let guest = |name: &str, limits: &str| {
            format!("[[guest]]\nname = '{name}'\nsocket = '{}/{name}.sock'\n{limits}", dir.display())
        };
        let text = "[limits]\nlog_lines = 100000\n".to_owned()
            + &guest("loud", "limits = { log_lines = 1 }\n")
            + &guest("other", "");
        let config = dir.join("svmd.toml");
        std::fs::write(&config, text).unwrap();
        command.arg("--config").arg(config).env("NO_COLOR", "1").stderr(Stdio::piped());
    });
    let mut client = Client::connect(&svmd.path("control.sock"));
    for _ in 0..NOISE {
        noise(&svmd.path("loud.sock"));
        noise(&svmd.path("other.sock"));
    }
    // A session that is still ending when the daemon does has nothing to tell.
    let deadline = Instant::now() + PATIENCE;
    for name in ["loud", "other"] {
        while client.result("guest.get", json!({"name": name}))["connected"] == true {
            assert!(Instant::now() < deadline, "{name} does not end");
        }
    }
    let loud = client.result("guest.get", json!({"name": "loud"}))["log_lines"].take();
    assert_eq!(loud["limit"], 1);
    assert!(loud["refused"].as_u64().unwrap() > 0, "{loud}");
    // All that is left to tell is told at the end.
    assert_eq!(client.result("shutdown", json!({})), json!({}));
    let mut log = String::new();
    svmd.take_stderr().read_to_string(&mut log).unwrap();
    let about = |name: &str| {
        let guest = format!("guest={name}");
        let sessions = ["VMM connected", "session ended", "VMM disconnected"];
        let is_ours = |line: &&str| line.contains(&guest) && sessions.iter().any(|text| line.contains(text));
        log.lines().filter(is_ours).count()
    };
    let (told, all) = (about("loud"), about("other"));
    assert_eq!(all, 3 * NOISE, "{log}");
    assert!(told <= all / 2, "{told} of {all}: {log}");
    let left_out = |line: &str| {
        let (before, _) = line.split_once(" lines about guest loud suppressed")?;
        before.rsplit(' ').next()?.parse::<usize>().ok()
    };
    assert_eq!(told + log.lines().filter_map(left_out).sum::<usize>(), all, "{log}");
}

/// What this process has logged.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Logged;

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn methods_that_fail_are_told_within_the_budget_of_their_socket() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| Logged).init();
    let limits = Limits { log_lines: 1, ..LIMITS };
    let server = Server::start_limited(vec![Idle::start(BROKEN, Vec::new())], Options::default(), limits);
    let mut client = server.client();
    for _ in 0..NOISE {
        assert_eq!(client.error("device.ledger", json!({"device": 0})), (-32603, "internal".into()));
    }
    assert_eq!(client.result("guest.list", json!({})), json!({"guests": []}));
    drop(server);
    let logged = String::from_utf8(LOGGED.lock().unwrap().clone()).unwrap();
    let told = logged.matches("a control method failed").count();
    assert!((1..=NOISE / 2).contains(&told), "{told} of {NOISE}: {logged}");
    assert!(logged.contains("lines about clients of the control socket suppressed"), "{logged}");
}
