//! A process that writes its secrets wherever it can.

use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::{RawGuest, RawVm, userptr};
use integration::svmd::{DeviceKind, Options, Svmd};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use virtio_gpu_svm::protocol::control::SvmResp;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_COPY, OP_FILL, OP_REDUCE, Packet};
use virtio_gpu_svm::protocol::request::{ReqHdr, SVM_REQ_VM_GET_PROPERTY, VmProperty, VmRef};
use virtio_gpu_svm::protocol::{CAPSET_SVM, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

/// What the process has. Each half is looked for: as it is, and as the numbers that it is.
const SECRET: [u8; 16] = *b"5eCrEt-0f~vm0/A!";
/// The name that the process gives itself, which its own operator may see.
const NAME: &str = "n4Me:of#prOcess1";
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
const PAGES: usize = 32;

fn halves() -> [u64; 2] {
    [0, 8].map(|at| u64::from_le_bytes(SECRET[at..at + 8].try_into().unwrap()))
}

/// In what form, if any, something of the secret is in these bytes.
fn found(bytes: &[u8]) -> Option<String> {
    let mut forms = vec![NAME.as_bytes().to_vec()];
    for half in halves() {
        forms.push(half.to_le_bytes().to_vec());
        forms.push(half.to_be_bytes().to_vec());
        forms.push(half.to_string().into_bytes());
        forms.push(format!("{half:x}").into_bytes());
        forms.push(format!("{half:X}").into_bytes());
    }
    let of = |form: &Vec<u8>| bytes.windows(form.len()).any(|window| window == form);
    forms.into_iter().find(of).map(|form| String::from_utf8_lossy(&form).into_owned())
}

/// A process of a guest: its pages, at A and at C.
struct Process {
    vm: RawVm,
    pages: Vec<u64>,
}

impl Process {
    fn start(guest: &mut RawGuest, ram: &GuestRam, ctx_id: u32, name: &str) -> Self {
        let mut debug_name = [0; 64];
        debug_name[..name.len()].copy_from_slice(name.as_bytes());
        let nlen = u32::try_from(name.len()).unwrap().into();
        let hdr =
            CtrlHdr { kind: VIRTIO_GPU_CMD_CTX_CREATE.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() };
        let create = CtxCreate { hdr, nlen, context_init: CAPSET_SVM.into(), debug_name };
        assert_eq!(guest.send::<SvmResp>(&create, &[]).unwrap().status.get(), 0);
        let vm = guest.create_vm(ctx_id, 0).unwrap();
        let bytes = PAGES as u64 * PAGE_SIZE;
        assert_eq!(guest.bind(vm, &[userptr(C, A, bytes)]).unwrap(), 0);
        let pages: Vec<u64> =
            ram.take_pages(PAGES).unwrap().into_iter().map(|page| page * PAGE_SIZE).collect();
        Self { vm, pages }
    }
    fn write(&self, ram: &GuestRam, pages: std::ops::Range<usize>, pattern: &[u8]) {
        let page = pattern.repeat(PAGE_SIZE as usize / pattern.len());
        pages.for_each(|number| ram.write(self.pages[number], &page).unwrap());
    }
    fn read(&self, ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0; PAGES * PAGE_SIZE as usize];
        let pages = bytes.chunks_mut(PAGE_SIZE as usize);
        pages.zip(&self.pages).for_each(|(page, at)| ram.read(*at, page).unwrap());
        bytes
    }
    /// Answers the next fault with its page.
    fn serve(&self, guest: &mut RawGuest) {
        let fault = guest.wait_fault(self.vm.ctx_id).unwrap();
        let number = usize::try_from((fault.cpu_addr.get() - A) / PAGE_SIZE).unwrap();
        assert_eq!(guest.answer(&fault, &[(fault.cpu_addr.get(), self.pages[number])], 0).unwrap(), 0);
    }
    /// Answers faults until a job has ended.
    fn serve_until_done(&self, guest: &mut RawGuest, faults: usize) {
        (0..faults).for_each(|_| self.serve(guest));
        assert_eq!(guest.wait_job(self.vm.ctx_id).unwrap().status.get(), 0);
    }
}

fn page(number: u64) -> u64 {
    C + number * PAGE_SIZE
}
fn copy(to: u64, from: u64, pages: u64) -> Packet {
    let len = (pages * PAGE_SIZE).into();
    Packet { opcode: OP_COPY.into(), dst: page(to).into(), src: page(from).into(), len, ..Packet::default() }
}
fn fill(at: u64, value: u64) -> Packet {
    let (dst, len) = (page(at).into(), PAGE_SIZE.into());
    Packet { opcode: OP_FILL.into(), dst, len, value: value.into(), ..Packet::default() }
}
fn reduce(to: u64, from: u64) -> Packet {
    let (dst, src, len) = (page(to).into(), page(from).into(), PAGE_SIZE.into());
    Packet { opcode: OP_REDUCE.into(), dst, src, len, ..Packet::default() }
}

/// Commands with the secret in every field that takes anything, good ones and such as are refused. None may fail to be
/// answered.
fn tell_everything(guest: &mut RawGuest) {
    let [first, second] = halves();
    for kind in (0x100..0x10f).chain(0x200..0x20a).chain(0x300..0x303).chain(0x400..0x406) {
        let hdr = CtrlHdr {
            kind: kind.into(),
            flags: VIRTIO_GPU_FLAG_FENCE.into(),
            fence_id: first.into(),
            ctx_id: 1.into(),
            ..CtrlHdr::default()
        };
        for bytes in [8, 16, 32, 72, 512, 4096] {
            let command = [hdr.as_bytes(), &SECRET.repeat(bytes / 16 + 1)[..bytes]].concat();
            guest.command(&command, 4096).unwrap();
            guest.cursor_command(&command, 4096).unwrap();
        }
    }
    guest.submit(1, &SECRET.repeat(64), 1024).unwrap();
    // A good request among bad ones: its number is the process' own.
    let hdr = ReqHdr {
        cmd: SVM_REQ_VM_GET_PROPERTY.into(),
        len: 24.into(),
        seqno: u32::try_from(second & 0xffff_ffff).unwrap().into(),
        ..ReqHdr::default()
    };
    let property = VmRef { hdr, vm_id: 1.into(), ..VmRef::default() };
    let (head, _) = guest.submit(1, &[property.as_bytes(), &SECRET].concat(), 1024).unwrap();
    assert_ne!(head.status.get(), 0);
}

/// Everything that an operator can ask, with all that may be named.
fn ask_everything(daemon: &Svmd) -> Vec<(String, String)> {
    let methods = daemon.call("rpc.discover", json!({})).unwrap()["methods"].take();
    let mut said = vec![];
    for method in methods.as_array().unwrap() {
        let name = method["name"].as_str().unwrap();
        // The first would take the answers of the others, the rest end what is looked at.
        if ["events.subscribe", "guest.add", "guest.remove", "shutdown"].contains(&name) {
            continue;
        }
        let mut params = Map::new();
        for param in method["params"].as_array().unwrap().iter().filter_map(|param| param["name"].as_str()) {
            let value = match param {
                "guest" | "name" => json!("vm0"),
                "ctx_id" => json!(1),
                "device" => json!(0),
                "limit" => json!(64),
                _ => continue,
            };
            params.insert(param.to_owned(), value);
        }
        let result = daemon.call(name, Value::Object(params));
        let result = result.unwrap_or_else(|cause| panic!("{name}: {cause:#}"));
        said.push((name.to_owned(), result.to_string()));
    }
    assert!(said.len() >= 10, "{}", said.len());
    said
}

fn connect(daemon: &Svmd, guest: &str, seed: u64) -> (RawGuest, Arc<GuestRam>) {
    let ram = GuestRam::new(Layout::Flat { bytes: 48 << 20 }, seed).unwrap();
    let mut connected = RawGuest::connect(&daemon.socket(guest), &ram, Profile::Qemu).unwrap();
    connected.hello(seed).unwrap();
    (connected, ram)
}

fn secrets_stay(kind: DeviceKind) {
    let options = Options {
        guests: vec!["vm0".into(), "vm1".into()],
        devices: 1,
        kind,
        arguments: vec!["--log".into(), "trace".into()],
        ..Options::default()
    };
    let daemon = Svmd::launch(&options).unwrap();
    let (mut vm0, ram0) = connect(&daemon, "vm0", 2);
    let keeper = Process::start(&mut vm0, &ram0, 1, NAME);
    keeper.write(&ram0, 0..PAGES, &SECRET);
    tell_everything(&mut vm0);
    let [first, second] = halves();
    let packets = [copy(8, 0, 4), fill(12, first), reduce(13, 12), fill(14, second)];
    vm0.exec(keeper.vm, 0, first, &packets).unwrap();
    // 4 pages are read and 4 written, of the others 3 written; then a copy stops half way and stays on its engine's ring.
    keeper.serve_until_done(&mut vm0, 11);
    vm0.exec(keeper.vm, 0, second, &[copy(20, 0, 4)]).unwrap();
    (0..2).for_each(|_| keeper.serve(&mut vm0));
    let held = vm0.wait_fault(1).unwrap();

    // Another process of the same guest, and one of another guest, do the same with pages of their own.
    let (mut vm1, ram1) = connect(&daemon, "vm1", 1);
    let others = [(2, "neighbour"), (1, "stranger")];
    for (guest, ram, (ctx_id, name)) in [(&mut vm0, &ram0, others[0]), (&mut vm1, &ram1, others[1])] {
        let other = Process::start(guest, ram, ctx_id, name);
        other.write(ram, 0..PAGES, &[0]);
        other.write(ram, 0..4, b"of-no-secret+own");
        guest.exec(other.vm, 0, 7, &[copy(8, 0, 4), fill(12, 3), reduce(13, 12)]).unwrap();
        other.serve_until_done(guest, 10);
        let hdr = ReqHdr { cmd: SVM_REQ_VM_GET_PROPERTY.into(), len: 24.into(), ..ReqHdr::default() };
        let property = VmRef { hdr, vm_id: other.vm.vm_id.into(), ..VmRef::default() }.as_bytes().to_vec();
        let (_, reply) = guest.submit(ctx_id, &property, 1024).unwrap();
        assert!(VmProperty::read_from_prefix(&reply).is_ok());
        assert_eq!(found(&reply), None, "{name}");
        let pages = other.read(ram);
        assert_eq!(found(&pages), None, "{name}");
        assert_eq!(pages[..4 * 4096], pages[8 * 4096..12 * 4096], "{name}");
    }
    // All answers and records of vm1 are in its memory, and whatever else was written there.
    assert_eq!(found(&ram1.contents().unwrap()), None, "memory of vm1");
    assert!(found(&ram0.contents().unwrap()).is_some(), "the search finds what is there");

    for (method, result) in ask_everything(&daemon) {
        let name = method.starts_with("context.").then(|| result.replace(NAME, ""));
        assert_eq!(found(name.as_ref().unwrap_or(&result).as_bytes()), None, "{method}: {result}");
    }
    assert_eq!(vm0.refuse(&held).unwrap(), 0);
    drop(vm0);
    daemon.stop().unwrap();
    let log = daemon.log();
    assert!(log.contains("VMM connected"), "{log}");
    assert_eq!(found(log.as_bytes()), None, "{log}");
}

#[test]
fn secrets_of_a_process_stay_with_it() {
    secrets_stay(DeviceKind::Soft);
}

#[test]
fn secrets_of_a_process_stay_with_it_on_hostmmu() {
    secrets_stay(DeviceKind::Hostmmu);
}
