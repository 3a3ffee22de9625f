//! One process on every kind of device that a daemon can be configured to have, through real sockets, rings and an agent
//! that knows nothing of kinds: the same memory, the same job, the same result.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use guest_agent::agent::AgentOptions;
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::vmm::Vmm;
use integration::guest::{SimulatedGuest, SimulatedProcess};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use virtio_gpu_svm::protocol::errno::{EFAULT, EINVAL};
use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, OP_FILL, OP_REDUCE, Packet};

const MIB: u64 = 1 << 20;
/// A CPU address that needs 47 bits.
const A: u64 = 0x7e00_0000_0000;
/// Words that a job sums; its results stand behind them.
const WORDS: u64 = 100_000;
/// A GPU address that every device has.
const C: u64 = 0x4000_0000;

const REPLAYABLE: u32 = 0;
const NO_FAULTS: u32 = 1;
const IDENTITY: u32 = 2;
const BITS_40: u32 = 3;
const BITS_32: u32 = 4;

/// Soft devices by number, as above: their name and what is said of them.
const DEVICES: [(&str, &str); 5] = [
    ("replayable", ""),
    ("no-faults", "fault_model = \"none\""),
    ("identity", "address_model = \"identity\""),
    ("bits40", "va_bits = 40"),
    ("bits32", "va_bits = 32"),
];

fn daemon() -> Svmd {
    let device =
        |(name, keys): &(&str, &str)| format!("[[device]]\nkind = \"soft\"\nname = \"{name}\"\n{keys}\n");
    let more = DEVICES.iter().map(device).collect();
    Svmd::launch(&Options { devices: 0, more, ..Options::default() }).unwrap()
}

fn guest(daemon: &Svmd) -> SimulatedGuest {
    let ram = GuestRam::new(Layout::WithHole { low_bytes: 96 * MIB, high_bytes: 32 * MIB }, 7).unwrap();
    let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram, Profile::CloudHypervisor).unwrap();
    SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap()
}

/// A process with numbers in its memory at A.
fn process(guest: &SimulatedGuest) -> SimulatedProcess {
    let mut process = guest.spawn("kinds").unwrap();
    process.map_memory(A, MIB).unwrap();
    for word in 0..WORDS {
        process.write(A + 8 * word, &(word * word).to_le_bytes()).unwrap();
    }
    process
}

/// Sums the words and marks that it did; `at` is where the memory is shown to the device.
fn sum(at: u64, mark: u64) -> [Packet; 2] {
    let (result, len) = (at + 8 * WORDS, (8 * WORDS).into());
    [
        Packet { opcode: OP_REDUCE.into(), dst: result.into(), src: at.into(), len, ..Packet::default() },
        Packet {
            opcode: OP_FILL.into(),
            dst: (result + 8).into(),
            len: 8.into(),
            value: mark.into(),
            ..Packet::default()
        },
    ]
}

/// Runs the job and checks its results, then takes them back.
fn check_sum(process: &SimulatedProcess, dev_id: u32, at: u64) {
    let (mark, result) = (0x5ca1e + u64::from(dev_id), A + 8 * WORDS);
    process.exec(dev_id, 0, 1, &sum(at, mark)).unwrap();
    process.finish_job().unwrap();
    let expected = (0..WORDS).map(|word| word * word).sum::<u64>();
    assert_eq!(
        (process.read_word(result).unwrap(), process.read_word(result + 8).unwrap()),
        (expected, mark)
    );
    process.write(result, &[0; 16]).unwrap();
}

/// The GPU VM of a device, as operators see it.
fn seen(daemon: &Svmd, process: &SimulatedProcess, dev_id: u32) -> Value {
    let asked = json!({ "guest": "vm0", "ctx_id": process.ctx_id() });
    let context = daemon.call("context.get", asked).unwrap();
    let vms = context["vms"].as_array().unwrap().clone();
    vms.into_iter().find(|vm| vm["device"] == dev_id).unwrap()
}

#[test]
fn same_memory_and_job_on_every_kind_of_device() {
    let daemon = daemon();
    let guest = guest(&daemon);
    let mut process = process(&guest);
    for dev_id in 0..5 {
        process.create_vm(dev_id).unwrap();
        let at = if dev_id == IDENTITY { A } else { C };
        if dev_id != IDENTITY {
            process.bind(dev_id, at, A, MIB).unwrap();
        }
        check_sum(&process, dev_id, at);
        let vm = seen(&daemon, &process, dev_id);
        assert_eq!(
            (&vm["state"], &vm["held"], &vm["wanted_pages"]),
            (&json!("usable"), &json!(false), &json!(0))
        );
        if dev_id == NO_FAULTS {
            assert_eq!(vm["resident_pages"], MIB / 4096, "all that is mapped, touched or not");
        }
    }
    let devices = daemon.call("device.list", json!({})).unwrap();
    let raised = |dev_id: u32| devices["devices"][dev_id as usize]["faults_raised"].as_u64().unwrap();
    assert_eq!(raised(NO_FAULTS), 0);
    assert!([REPLAYABLE, IDENTITY, BITS_40, BITS_32].into_iter().all(|dev_id| raised(dev_id) > 0));
}

#[test]
fn what_a_kind_cannot_do_is_refused_with_a_reason() {
    let daemon = daemon();
    let guest = guest(&daemon);
    let mut process = process(&guest);
    for dev_id in [NO_FAULTS, IDENTITY, BITS_32] {
        process.create_vm(dev_id).unwrap();
    }
    let refusal = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    let mirror = refusal(process.mirror(NO_FAULTS, C, 0, MIB));
    assert!(mirror.contains("EOPNOTSUPP"), "{mirror}");
    let elsewhere = refusal(process.bind(IDENTITY, C, A, MIB));
    assert!(elsewhere.contains("EINVAL"), "{elsewhere}");
    process.bind(IDENTITY, A, A, MIB).unwrap();
    let unmapped = refusal(process.unbind(IDENTITY, A, MIB));
    assert!(unmapped.contains("EOPNOTSUPP"), "{unmapped}");
    let beyond = refusal(process.bind(BITS_32, 1 << 32, A, MIB));
    assert!(beyond.contains("EINVAL"), "{beyond}");
}

#[test]
fn eviction_without_faults_is_not_seen_by_jobs() {
    let daemon = daemon();
    let guest = guest(&daemon);
    let mut process = process(&guest);
    process.create_vm(NO_FAULTS).unwrap();
    process.bind(NO_FAULTS, C, A, MIB).unwrap();
    check_sum(&process, NO_FAULTS, C);
    let add = Packet {
        opcode: OP_ATOMIC_ADD.into(),
        dst: (C + 8 * WORDS + 64).into(),
        value: 1.into(),
        ..Packet::default()
    };
    let (rounds, packets) = (20, 1000);
    for _ in 0..rounds {
        process.exec(NO_FAULTS, 0, 1, &vec![add; packets]).unwrap();
        let evict = json!({ "guest": "vm0", "ctx_id": process.ctx_id() });
        daemon.call("context.evict", evict).unwrap();
    }
    for _ in 0..rounds {
        process.finish_job().unwrap();
    }
    assert_eq!(process.read_word(A + 8 * WORDS + 64).unwrap(), rounds * packets as u64);
}

#[test]
fn memory_taken_back_without_faults_costs_that_gpu_vm_alone() {
    let daemon = daemon();
    let guest = guest(&daemon);
    let mut process = process(&guest);
    let arena = process.map_memory(A + 16 * MIB, MIB).unwrap();
    for dev_id in [REPLAYABLE, NO_FAULTS] {
        process.create_vm(dev_id).unwrap();
        process.bind(dev_id, C, A, MIB).unwrap();
        process.bind(dev_id, C + 16 * MIB, A + 16 * MIB, MIB).unwrap();
        check_sum(&process, dev_id, C);
    }
    process.unmap_memory(arena, A + 16 * MIB, MIB).unwrap();
    // The agent is asked for the pages again, and refuses.
    let vm = loop {
        let vm = seen(&daemon, &process, NO_FAULTS);
        if vm["held"] == false {
            break vm;
        }
        std::thread::yield_now();
    };
    assert_eq!((&vm["state"], &vm["error"]), (&json!("unusable"), &json!(EFAULT)));
    let refused = process.exec(NO_FAULTS, 0, 1, &sum(C, 0)).unwrap_err();
    assert!(format!("{refused:#}").contains("EPIPE"), "{refused:#}");
    check_sum(&process, REPLAYABLE, C);
    process.exec(REPLAYABLE, 0, 1, &sum(C + 64 * MIB, 0)).unwrap();
    assert_eq!(process.wait_job().unwrap().status.get(), -EINVAL, "nothing is mapped there");
}
