//! Ordinary programs' memory on soft GPUs through plain pointers: real processes, allocator library, broker, rings and
//! daemon; only the guest around them is this process.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use integration::binaries::build_host;
use integration::demo::{Stage, VmmKind, show};
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::vmm::Vmm;
use integration::initramfs::FIRST_UID;
use integration::ordinary::{Ordinary, open_folder, sources};
use integration::story::Machine;
use integration::story::host::{HostMachine, Programs};
use integration::svmd::{DeviceKind, Options, Svmd};
use std::path::Path;
use std::process::Command;

/// A guest whose agent answers faults at once. `folder` is for its socket.
fn machine(daemon: &Svmd, folder: &Path, programs: Programs) -> HostMachine {
    let ram = GuestRam::new(Layout::Flat { bytes: 512 << 20 }, 1).unwrap();
    let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram, Profile::CloudHypervisor).unwrap();
    let machine = HostMachine::start("vm0", vmm, folder, programs).unwrap();
    machine.hold_answers(false).unwrap();
    machine
}

#[test]
fn plain_pointers_of_every_kind_of_memory_work_on_the_device() {
    let programs = build_host(&[]).unwrap();
    let program = programs.get("any-pointer").unwrap();
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| programs.get(name).unwrap().to_owned();
    let (agent, allocator) = (path("svm-agent"), path("libsvm_alloc.so"));
    let started = Programs { process: program.to_owned(), agent, allocator, folder: folder.path().into() };
    let machine = machine(&daemon, folder.path(), started);

    let mut command = Command::new(program);
    command
        .env("LD_PRELOAD", programs.get("libsvm_alloc.so").unwrap())
        .env("SVM_AGENT_SOCKET", machine.agent_socket());
    let output = command.output().unwrap();
    let (told, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.is_empty(), "{told}{said}");
    let kinds = ["small blocks: 3000", "a large block: 2703", "globals: 3000", "stack of a thread: 500"];
    for kind in kinds {
        assert_eq!(told.matches(kind).count(), 2, "{kind}: {told}");
    }
    assert_eq!(told.matches("stack of main: packet 0 failed").count(), 2, "{told}");

    // Without the library there is nothing to join, and the program says what to do.
    let output = Command::new(program).env("SVM_AGENT_SOCKET", machine.agent_socket()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("LD_PRELOAD=libsvm_alloc.so"), "{said}");
}

/// Soft devices with fewer address bits than a process.
const NARROW: [(&str, u32); 2] = [("bits40", 40), ("bits32", 32)];
/// What the program has of each on every device, most of it from after the mirrors were made.
const IN_WINDOWS: [&str; 4] = ["list", "large", "mapping", "global"];

#[test]
fn memory_that_comes_after_a_mirror_is_in_the_windows_of_devices_with_few_address_bits() {
    let built = build_host(&[]).unwrap();
    let mut ordinary = Ordinary::new(&built).unwrap();
    let [program, _] = sources("windows");
    ordinary.compile(&[program]).unwrap();
    let device = |(name, bits): &(&str, u32)| {
        format!("[[device]]\nkind = \"soft\"\nname = \"{name}\"\nva_bits = {bits}\n")
    };
    let more = NARROW.iter().map(device).collect();
    let daemon = Svmd::launch(&Options { devices: 0, more, ..Options::default() }).unwrap();
    let folder = open_folder().unwrap();
    let machine = machine(&daemon, folder.path(), Programs::of(&built, &ordinary).unwrap());

    let mut windows = machine.start(FIRST_UID, &["windows".to_owned()]).unwrap();
    for (device, bits) in NARROW {
        for kind in IN_WINDOWS {
            let line = windows.line().unwrap();
            assert!(line.starts_with(&format!("device={device} kind={kind} ")), "{line}");
            let number = |name: &str| {
                let value = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix("=0x"));
                u64::from_str_radix(value.unwrap(), 16).unwrap()
            };
            assert!(number("pointer") >> bits > 0 && number("address") >> bits == 0, "{line}");
            assert!(line.ends_with(" ok"), "{line}");
        }
    }
    assert_eq!(windows.line().unwrap(), "done");
    windows.end().unwrap();
    assert!(daemon.stat("/counters/faults_answered").unwrap() > 0, "no device has asked for a page");
}

#[test]
fn story_without_qemu_has_its_third_act() {
    let stage =
        Stage { vmm: VmmKind::Inproc, guests: 2, processes: 2, device: DeviceKind::Soft, sabotage: None };
    let report = show(stage, &|line| println!("{line}")).unwrap();
    assert!(report.holds(), "{report:?}");
    let act = report.plain_pointers.unwrap();
    // Two programs in each guest, two devices.
    assert_eq!((act.programs, act.walks, act.wrong, act.misrouted), (4, 8, 0, 0), "{act:?}");
}
