//! The path with a real vCPU: guest code rings the doorbells and takes the interrupts. Needs a /dev/kvm that opens; where
//! it does not, each test says so and is skipped. Whatever else goes wrong is a failure.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![cfg(target_arch = "x86_64")]

use guest_agent::agent::AgentOptions;
use integration::frontend::Profile;
use integration::frontend::kvm;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::RawGuest;
use integration::frontend::vmm::Vmm;
use integration::guest::SimulatedGuest;
use integration::svmd::{Options, Svmd};
use std::io::Write;
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, RespDisplayInfo, VIRTIO_GPU_CMD_GET_DISPLAY_INFO, VIRTIO_GPU_RESP_OK_DISPLAY_INFO,
};
use virtio_gpu_svm::protocol::job::{OP_COPY, Packet};
use virtio_gpu_svm::protocol::{CONTROLQ, EVENTQ};

const MIB: u64 = 1 << 20;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;

/// A guest with a vCPU, or a word on the real stderr why there is none.
fn machine(daemon: &Svmd, profile: Profile) -> Option<Vmm> {
    if let Err(cause) = kvm::available() {
        // Not eprintln, which the test harness would capture.
        std::io::stderr().write_all(format!("SKIPPED a KVM test: {cause:#}\n").as_bytes()).unwrap();
        return None;
    }
    let ram = GuestRam::new(Layout::WithHole { low_bytes: 64 * MIB, high_bytes: 16 * MIB }, 1).unwrap();
    Some(Vmm::with_vcpu(&daemon.socket("vm0"), &ram, profile).unwrap())
}

#[test]
fn kvm_vcpu_rings_the_doorbell_of_each_command_and_takes_interrupts() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let Some(vmm) = machine(&daemon, Profile::Qemu) else { return };
    let mut guest = RawGuest::over(vmm).unwrap();
    guest.hello(1).unwrap();
    let rounds = 100;
    for _ in 0..rounds {
        let hdr = CtrlHdr { kind: VIRTIO_GPU_CMD_GET_DISPLAY_INFO.into(), ..CtrlHdr::default() };
        let display: RespDisplayInfo = guest.send(&hdr, &[]).unwrap();
        assert_eq!(display.hdr.kind.get(), VIRTIO_GPU_RESP_OK_DISPLAY_INFO);
    }
    // A raw guest that finds its answer before it has waited goes on, so interrupts may come together.
    let interrupts = guest.vmm().interrupts(usize::from(CONTROLQ)).unwrap();
    assert!(interrupts >= 1, "{interrupts} interrupts");
    guest.vmm().check().unwrap();
}

#[test]
fn kvm_faults_go_to_the_guest_and_back_through_the_vcpu() {
    for profile in [Profile::Qemu, Profile::CloudHypervisor] {
        let daemon = Svmd::launch(&Options::default()).unwrap();
        let Some(vmm) = machine(&daemon, profile) else { return };
        let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
        let mut process = guest.spawn("copy").unwrap();
        process.map_memory(A, MIB).unwrap();
        let text = b"from a process, by a device, through a vCPU";
        process.write(A + 100, text).unwrap();
        process.create_vm(0).unwrap();
        process.bind(0, C, A, MIB).unwrap();
        let copy = Packet {
            opcode: OP_COPY.into(),
            src: (C + 100).into(),
            dst: (C + MIB / 2).into(),
            len: (text.len() as u64).into(),
            ..Packet::default()
        };
        process.exec(0, 0, 1, &[copy]).unwrap();
        process.finish_job().unwrap();
        let mut copied = vec![0; text.len()];
        process.read(A + MIB / 2, &mut copied).unwrap();
        assert_eq!(copied, text);
        // Source and destination.
        assert_eq!(guest.answers(&[0, 1]).unwrap().len(), 2);
        assert!(guest.vmm().interrupts(usize::from(EVENTQ)).unwrap() >= 1);
    }
}
