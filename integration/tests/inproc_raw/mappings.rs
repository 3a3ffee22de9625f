//! As many mappings as a GPU VM may have with the limits that a daemon has unless told otherwise, made by the largest
//! VM_BINDs, and one more.

use crate::{connect, ram, take_pages};
use guest_agent::client::packet;
use integration::frontend::ram::GuestRam;
use integration::frontend::raw::{RawGuest, RawVm, unmap, userptr};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::sync::Arc;
use virtio_gpu_svm::protocol::errno::ENOSPC;
use virtio_gpu_svm::protocol::request::BindOp;
use virtio_gpu_svm::protocol::{MAX_BINDS, PAGE_SIZE};

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
const MOST: u64 = 65_536;
/// Pages from one mapping to the next, so that none continues another. A mapping has three of them.
const STRIDE: u64 = 4 * PAGE_SIZE;

struct Rig {
    daemon: Svmd,
    ram: Arc<GuestRam>,
    guest: RawGuest,
    gpa: u64,
    filled: u64,
    seq: u64,
}

fn map(number: u64) -> BindOp {
    userptr(C + number * STRIDE, A + number * STRIDE, 3 * PAGE_SIZE)
}

impl Rig {
    fn start() -> Self {
        let daemon = Svmd::launch(&Options { devices: 1, ..Options::default() }).unwrap();
        let ram = ram(1);
        let mut guest = connect(&daemon, "vm0", &ram);
        guest.create_context(1).unwrap();
        let gpa = take_pages(&ram, 1)[0];
        Self { daemon, ram, guest, gpa, filled: 0, seq: 0 }
    }

    fn bind_all(&mut self, vm: RawVm, ops: &[BindOp]) {
        for part in ops.chunks(usize::try_from(MAX_BINDS).unwrap()) {
            assert_eq!(part.len(), usize::try_from(MAX_BINDS).unwrap());
            assert_eq!(self.guest.bind(vm, part).unwrap(), 0);
        }
    }

    fn context(&self) -> Value {
        let mut listed = self.daemon.call("context.list", json!({ "guest": "vm0" })).unwrap();
        listed["contexts"][0].as_object_mut().unwrap().remove("counters");
        listed["contexts"][0].take()
    }

    fn mappings(&self) -> u64 {
        self.context()["vms"][0]["mappings"].as_u64().unwrap()
    }

    /// A VM_BIND that there is no room for has no effect, and the GPU VM goes on.
    fn assert_full(&mut self, vm: RawVm) {
        let before = self.context();
        assert_eq!(before["vms"][0]["mappings"], MOST);
        let beyond = [
            vec![map(MOST)],
            // Its middle: what is left are two.
            vec![unmap(C + PAGE_SIZE, PAGE_SIZE)],
            // Room for one, and then for one more.
            vec![unmap(C, STRIDE), map(MOST), map(MOST + 1)],
        ];
        for ops in beyond {
            assert_eq!(self.guest.bind(vm, &ops).unwrap(), -ENOSPC);
            assert_eq!(self.context(), before);
        }
        self.fill(vm, 0);
        self.fill(vm, MOST - 1);
        assert_eq!(self.guest.bind(vm, &[unmap(C, STRIDE), map(0)]).unwrap(), 0);
    }

    /// A job writes in the middle of a mapping.
    fn fill(&mut self, vm: RawVm, number: u64) {
        self.filled += 1;
        let at = C + number * STRIDE + PAGE_SIZE;
        self.guest.exec(vm, 0, 0, &[packet::fill(at, 8, self.filled)]).unwrap();
        let fault = self.guest.wait_fault(1).unwrap();
        assert_eq!(fault.cpu_addr.get(), at - C + A);
        assert_eq!(self.guest.answer(&fault, &[(at - C + A, self.gpa)], self.seq).unwrap(), 0);
        assert_eq!(self.guest.wait_job(1).unwrap().status.get(), 0);
        assert_eq!(self.ram.load::<u64>(self.gpa).unwrap(), self.filled);
        self.seq = self.guest.invalidate(1, at - C + A, PAGE_SIZE).unwrap();
    }
}

#[test]
fn one_mapping_more_than_allowed_is_refused_without_effect() {
    let mut rig = Rig::start();
    let all: Vec<_> = (0..MOST).map(map).collect();
    let half: Vec<_> = (0..MOST).step_by(2).map(|number| unmap(C + number * STRIDE, STRIDE)).collect();
    let again: Vec<_> = (0..MOST).step_by(2).map(map).collect();
    for _ in 0..2 {
        let vm = rig.guest.create_vm(1, 0).unwrap();
        assert_eq!(rig.mappings(), 0);
        rig.bind_all(vm, &all);
        rig.assert_full(vm);
        rig.bind_all(vm, &half);
        assert_eq!(rig.mappings(), MOST / 2);
        rig.bind_all(vm, &again);
        rig.assert_full(vm);
        rig.guest.destroy_vm(vm).unwrap();
        assert_eq!(rig.context()["vms"], json!([]));
    }
    rig.daemon.stop().unwrap();
}
