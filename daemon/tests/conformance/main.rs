//! What every device does, asked of each kind through `trait Device` alone: real engines, real processes, real faults.

#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small numbers of the tests")]

mod faults;
mod groups;
mod no_faults;
mod null;
mod packets;
mod rig;
mod space;

use rig::{Kind, Rig};
use std::io::Write;
use std::path::Path;
use virtio_gpu_svm::device::{AddressModel, DeviceInfo, FaultModel};

/// Every kind of device. One more needs one more line.
const KINDS: [Kind; 6] = [
    Kind::Soft,
    Kind::SoftNoFaults,
    Kind::SoftIdentity,
    Kind::SoftNarrow { va_bits: 40 },
    Kind::SoftNarrow { va_bits: 32 },
    Kind::HostMmu { budget: daemon::hostmmu::DEFAULT_BUDGET },
];

/// Which devices a test is about, by what they promise.
struct About {
    /// As tests write it.
    name: &'static str,
    holds: fn(&DeviceInfo) -> bool,
}

/// Jobs park at faults.
const FAULTS: About = About { name: "FAULTS", holds: |info| info.fault_model == FaultModel::Replayable };
/// Jobs end where there is no translation.
const NO_FAULTS: About = About { name: "NO_FAULTS", holds: |info| info.fault_model == FaultModel::None };
/// Pages are asked for in groups.
const GROUPS: About = About { name: "GROUPS", holds: |info| info.address_model == AddressModel::Identity };
/// There are null translations.
const NULLS: About = About { name: "NULLS", holds: |info| info.null_mappings };
/// There are none.
const NO_NULLS: About = About { name: "NO_NULLS", holds: |info| !info.null_mappings };

/// Runs a test on every kind of device.
fn on_each(test: impl Fn(Rig)) {
    for_kinds(|_| true, test);
}

/// Runs a test on every kind of device that it is about.
fn on_each_with(about: About, test: impl Fn(Rig)) {
    for_kinds(about.holds, test);
}

fn for_kinds(about: fn(&DeviceInfo) -> bool, test: impl Fn(Rig)) {
    for kind in KINDS {
        if matches!(kind, Kind::HostMmu { .. }) && !has_userfaultfd() {
            continue;
        }
        let rig = Rig::new(kind);
        if about(rig.device.info()) {
            // The last of these is the one that failed.
            println!("on {kind:?}");
            test(rig);
        }
    }
}

/// Says how many tests each kind is asked, so that none is lost without a trace: neither a kind that no test is about, nor
/// a promise that no kind makes.
#[test]
fn every_kind_is_asked() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let text: String = files.map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let calls = |call: &str| text.lines().filter(|line| line.trim_start().starts_with(call)).count();
    let for_all = calls("on_each(");
    let special = [FAULTS, NO_FAULTS, GROUPS, NULLS, NO_NULLS]
        .map(|about| (calls(&format!("on_each_with({},", about.name)), about));
    let total = for_all + special.iter().map(|(count, _)| count).sum::<usize>();
    assert_eq!(total, for_all + calls("on_each_with("), "a test is about what is not listed here");

    let mut summary = format!("conformance, {total} tests:");
    let mut met = [false; 5];
    for kind in KINDS {
        if matches!(kind, Kind::HostMmu { .. }) && !has_userfaultfd() {
            summary += &format!(" {kind:?} x 0;");
            continue;
        }
        let rig = Rig::new(kind);
        let info = rig.device.info();
        let about_it = |(about, met): (&(usize, About), &mut bool)| {
            let holds = (about.1.holds)(info);
            *met |= holds;
            if holds { about.0 } else { 0 }
        };
        let asked = for_all + special.iter().zip(&mut met).map(about_it).sum::<usize>();
        assert!(asked > for_all, "no test is about what {kind:?} promises");
        summary += &format!(" {kind:?} x {asked};");
    }
    assert!(met.iter().all(|met| *met) && special.iter().all(|(count, _)| *count > 0), "{met:?}");
    // Not captured by the test harness, unlike eprintln.
    std::io::stderr().write_all(format!("{summary}\n").as_bytes()).unwrap();
}

/// Whether this kernel has what `hostmmu` needs. Without it, its half of the tests is skipped, loudly; not in CI.
fn has_userfaultfd() -> bool {
    let Err(error) = daemon::hostmmu::probe() else { return true };
    assert!(std::env::var_os("CI").is_none(), "hostmmu cannot be tested here: {error}");
    // Not captured by the test harness, unlike eprintln.
    let warning = format!("hostmmu is NOT tested here: {error}\n");
    std::io::stderr().write_all(warning.as_bytes()).unwrap();
    false
}
