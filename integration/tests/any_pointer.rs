//! An ordinary program's memory of every kind, walked by the soft GPU through plain pointers: real process, allocator
//! library, broker, rings and daemon; only the guest around them is this process.

use integration::binaries::build_host;
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::vmm::Vmm;
use integration::story::Machine;
use integration::story::host::{HostMachine, Programs};
use integration::svmd::{Options, Svmd};
use std::process::Command;

#[test]
fn plain_pointers_of_every_kind_of_memory_work_on_the_device() {
    let programs = build_host(&[]).unwrap();
    let program = programs.get("any-pointer").unwrap();
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let ram = GuestRam::new(Layout::Flat { bytes: 512 << 20 }, 1).unwrap();
    let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram, Profile::CloudHypervisor).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| programs.get(name).unwrap().to_owned();
    let (agent, allocator) = (path("svm-agent"), path("libsvm_alloc.so"));
    let started = Programs { process: program.to_owned(), agent, allocator, folder: folder.path().into() };
    let machine = HostMachine::start("vm0", vmm, folder.path(), started).unwrap();
    machine.hold_answers(false).unwrap();

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
