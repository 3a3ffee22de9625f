//! Clients that ask for more than their share: what they get, and that nobody else goes without.

use crate::device::Idle;
use crate::harness::{Client, Server, error_of};
use crate::vmm::Vmm;
use daemon::control::Options;
use rustix::net::{RecvFlags, recv};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use virtio_gpu_svm::device::{Access, Asid, Events, LedgerEntry, VmLabel};
use virtio_gpu_svm::host::Host;
use virtio_gpu_svm::protocol::CAPSET_SVM;
use virtio_gpu_svm::protocol::gpu::{
    CmdSubmit, CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_SUBMIT_3D,
    VIRTIO_GPU_RESP_OK_NODATA,
};
use virtio_gpu_svm::protocol::request::{ReqHdr, SVM_REQ_VM_CREATE, VmCreate};
use zerocopy::{FromBytes, IntoBytes};

/// Requests that a greedy client sends without reading; `SVM_GREEDY` sets it.
fn greed() -> u32 {
    std::env::var("SVM_GREEDY").map_or(10_000, |count| count.parse().unwrap())
}

/// However slow this machine is, a client that reads nothing yet must not be cut off for it.
fn patient() -> Options {
    Options { stall: Duration::from_secs(3600), ..Options::default() }
}

fn request(id: u32, method: &str) -> String {
    format!("{}\n", json!({"jsonrpc": "2.0", "method": method, "id": id}))
}

#[test]
fn client_that_sends_far_ahead_is_answered_in_order_and_others_meanwhile() {
    let server = Server::start_with(patient());
    let (mut greedy, mut polite) = (server.client(), server.client());
    let sender = greedy.stream().try_clone().unwrap();
    let count = greed();
    let sending = std::thread::spawn(move || {
        let mut sender = Client::over(sender);
        for first in (0..count).step_by(100) {
            sender.send(
                (first..count.min(first + 100)).map(|id| request(id, "server.info")).collect::<String>(),
            );
        }
    });
    // It takes nothing yet, so the server stops reading from it; others are served.
    for _ in 0..100 {
        polite.result("stats.get", json!({}));
    }
    for id in 0..count {
        assert_eq!(greedy.line()["id"], id);
    }
    sending.join().unwrap();
    polite.result("stats.get", json!({}));
}

#[test]
fn full_batches_of_many_clients_are_answered_in_full() {
    let server = Server::start_with(patient());
    let batch = format!("[{}]\n", vec![request(7, "rpc.discover").trim(); 128].join(","));
    let mut clients: Vec<Client> = (0..8).map(|_| server.client()).collect();
    clients.iter_mut().for_each(|client| client.send(&batch));
    server.client().result("stats.get", json!({}));
    for client in &mut clients {
        assert_eq!(client.line().as_array().unwrap().len(), 128);
    }
}

#[test]
fn many_who_come_and_go_leave_room() {
    let server = Server::start();
    let mut polite = server.client();
    for round in 0..1000 {
        // Some leave at once, some in the middle of a request.
        let stream = UnixStream::connect(server.socket()).unwrap();
        if round % 2 == 0 {
            Client::over(stream).send("{\"jsonrpc\":\"2.0\",\"met");
        }
        if round % 100 == 0 {
            polite.result("stats.get", json!({}));
        }
    }
    polite.result("stats.get", json!({}));
    while server.client().call_or_refusal()["error"]["data"]["kind"] == "too-many-connections" {}
}

/// A device whose ledger is a large result.
fn with_large_ledger() -> Server {
    let label = VmLabel { guest: "a guest of some name".into(), ctx_id: 1, generation: 1 };
    let entry = LedgerEntry { label, asid: Asid(9), page: 7, access: Access::Write };
    Server::start_on(vec![Idle::start("gpu0", vec![entry; 20_000])], patient())
}

#[test]
fn large_results_that_nobody_reads_are_few_and_small_ones_pass() {
    let server = with_large_ledger();
    let ask = |client: &mut Client| {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": "device.ledger", "params": {"device": 0}});
        client.send(format!("{request}\n"));
        let mut start = [0; 40];
        client.stream().read_exact(&mut start).unwrap();
        String::from_utf8_lossy(&start).into_owned()
    };
    let mut readers: Vec<Client> = (0..8).map(|_| server.client()).collect();
    for reader in &mut readers {
        let start = ask(reader);
        assert!(start.contains("result"), "{start}");
    }
    let mut ninth = server.client();
    assert_eq!(ninth.error("device.ledger", json!({"device": 0})), (-32000, "busy".into()));
    ninth.result("stats.get", json!({}));
    drop(readers.pop());
    // The server learns that it has gone when it next writes to it.
    while ninth.call("device.ledger", json!({"device": 0}))["error"]["data"]["kind"] == "busy" {}
}

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// A guest with a VMM, a context and a GPU VM, which somebody must destroy before the guest can go.
fn guest_with_gpu_vm(server: &Server, name: &str) -> Vmm {
    let socket = server.guest_socket(name);
    server.client().result("guest.add", json!({"name": name, "socket": socket}));
    let mut vmm = Vmm::start(socket.as_ref());
    let create = CtxCreate {
        hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, 1),
        context_init: CAPSET_SVM.into(),
        ..CtxCreate::default()
    };
    let len = (size_of::<VmCreate>() as u32).into();
    let payload = VmCreate {
        hdr: ReqHdr { cmd: SVM_REQ_VM_CREATE.into(), len, ..ReqHdr::default() },
        ..VmCreate::default()
    };
    let size = (payload.as_bytes().len() as u32).into();
    let submit = CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, 1), size, ..CmdSubmit::default() };
    for command in [create.as_bytes().to_vec(), [submit.as_bytes(), payload.as_bytes()].concat()] {
        let answer = vmm.command(&command);
        let (head, _) = CtrlHdr::read_from_prefix(&answer).unwrap();
        assert_eq!(head.kind.get(), VIRTIO_GPU_RESP_OK_NODATA);
    }
    vmm
}

fn has_answer(client: &Client) -> bool {
    client.stream().set_nonblocking(true).unwrap();
    let waiting = recv(client.stream(), &mut [0], RecvFlags::PEEK).is_ok();
    client.stream().set_nonblocking(false).unwrap();
    waiting
}

/// A daemon with five guests whose GPU VMs do not retire before [`Retiring`] is dropped. Whoever removes one waits.
fn with_guests_that_stay() -> (Server, Vec<Vmm>, Retiring) {
    let device = Idle::new("gpu0", Vec::new());
    let server = Server::start_on(vec![Arc::clone(&device) as _], patient());
    let vmms = (0..5).map(|n| guest_with_gpu_vm(&server, &format!("vm{n}"))).collect();
    let host = Arc::clone(server.registry.host());
    (server, vmms, Retiring { host, device })
}

/// See [`with_guests_that_stay`].
struct Retiring {
    host: Arc<Host>,
    device: Arc<Idle>,
}

impl Drop for Retiring {
    fn drop(&mut self) {
        let (host, device) = (Arc::clone(&self.host), Arc::clone(&self.device));
        // Until all guests have gone, which may be long after this.
        std::thread::spawn(move || {
            while !host.guests().is_empty() {
                device.take_destroyed().into_iter().for_each(|asid| host.retired(0, asid));
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
}

fn remove(client: &mut Client, name: &str) {
    let remove = json!({"jsonrpc": "2.0", "id": name, "method": "guest.remove", "params": {"name": name}});
    client.send(format!("{remove}\n"));
}

fn guests(client: &mut Client) -> usize {
    client.result("guest.list", json!({}))["guests"].as_array().unwrap().len()
}

#[test]
fn removals_that_wait_hold_up_nobody_but_other_changes() {
    let (server, _vmms, retiring) = with_guests_that_stay();
    let mut removers: Vec<Client> = (0..5).map(|_| server.client()).collect();
    for (n, client) in removers.iter_mut().enumerate() {
        remove(client, &format!("vm{n}"));
    }
    // As many wait as may, and the fifth for its turn: its guest is still there.
    let mut polite = server.client();
    while guests(&mut polite) > 1 {}
    for _ in 0..100 {
        assert_eq!(guests(&mut polite), 1);
        polite.result("stats.get", json!({}));
    }
    assert!(!removers.iter().any(has_answer));
    drop(retiring);
    for client in &mut removers {
        assert_eq!(client.line()["result"], json!({"removed": true}));
    }
}

#[test]
fn shutdown_does_not_wait_its_turn_behind_removals() {
    let (server, _vmms, _retiring) = with_guests_that_stay();
    let mut removers: Vec<Client> = (0..5).map(|_| server.client()).collect();
    for (n, client) in removers.iter_mut().enumerate() {
        remove(client, &format!("vm{n}"));
    }
    let mut polite = server.client();
    while guests(&mut polite) > 1 {}
    polite.result("shutdown", json!({}));
}

#[test]
fn client_that_sends_single_bytes_is_one_of_many() {
    let server = Server::start_with(patient());
    let (mut slow, mut polite) = (server.client(), server.client());
    for byte in request(1, "stats.get").bytes() {
        slow.send([byte]);
        polite.result("stats.get", json!({}));
    }
    assert_eq!(slow.line()["id"], 1);
}

#[test]
fn subscriber_that_only_sends_is_cut_off() {
    let server = Server::start_with(Options { stall: Duration::from_millis(100), ..Options::default() });
    let mut client = server.client();
    client.result("events.subscribe", json!({}));
    let lines = request(1, "rpc.discover").repeat(100);
    let cut_off = loop {
        if let Err(error) = std::io::Write::write_all(&mut client.stream(), lines.as_bytes()) {
            break error;
        }
    };
    assert!(matches!(cut_off.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
    assert_eq!(error_of(&server.client().call("guest.get", json!({"name": "x"}))).1, "guest-not-found");
    let _: Value = server.client().result("stats.get", json!({}));
}
