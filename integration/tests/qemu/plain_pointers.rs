//! Ordinary programs in a real guest, started by `svm-agent run`: memory of every kind, and processes that live.

use anyhow::{Context, Result, ensure};
use integration::initramfs::FIRST_UID;
use integration::ordinary::Scene;
use integration::provision::Vm;
use integration::qemu::ROOT;
use serde_json::Value;
use std::collections::BTreeMap;

/// What must become of a kind of memory.
#[derive(Clone, Copy)]
enum Verdict {
    Works,
    /// With a message that names this.
    Refused(&'static str),
}
use Verdict::{Refused, Works};

/// README's table, where the agent trusts no process.
const STRICT: [(&str, Verdict); 28] = [
    ("malloc, small", Works),
    ("malloc, large", Works),
    ("realloc", Works),
    ("aligned_alloc", Works),
    ("malloc before main", Works),
    ("global with a value", Works),
    ("global without", Works),
    ("stack of a thread", Works),
    ("stack of main", Refused("thread")),
    ("mmap, anonymous", Works),
    ("mmap, anonymous, 16 MiB", Works),
    ("mmap, anonymous and shared", Works),
    ("huge pages (MAP_HUGETLB)", Refused("MFD_HUGETLB")),
    ("huge pages (MFD_HUGETLB)", Works),
    ("huge pages (MADV_HUGEPAGE)", Works),
    ("sbrk", Refused("malloc")),
    ("memfd", Works),
    ("POSIX shared memory", Works),
    ("System V shared memory", Refused("mmap")),
    ("file on tmpfs, shared", Works),
    ("file on tmpfs, shared, read only", Refused("malloc")),
    ("file on tmpfs, private", Works),
    ("file on tmpfs, private, read only", Refused("malloc")),
    ("file on another file system, shared", Refused("malloc")),
    ("file on another file system, shared, read only", Refused("malloc")),
    ("file on another file system, private", Works),
    ("file on another file system, private, read only", Refused("malloc")),
    ("shared by two processes", Works),
];

/// Kinds that work besides where the agent trusts the process; the others are as above.
const TRUSTED: [&str; 4] = ["stack of main", "huge pages (MAP_HUGETLB)", "sbrk", "System V shared memory"];
/// A user whose processes are trusted, and one whose are not.
const TRUSTED_UID: u32 = FIRST_UID;
const STRICT_UID: u32 = FIRST_UID + 1;

/// How long processes live unless `SVM_LIFE_SECONDS` says otherwise. `SVM_SEED` draws other lives.
const LIFE_SECONDS: u64 = 30;
const LIVING: u32 = 8;

pub fn every_kind_of_memory(vm: &Vm) -> Result<()> {
    let scene = Scene::trusting(vm, "kinds", TRUSTED_UID)?;
    scene.guest.check(ROOT, ["sh", "-c", "echo 8 > /proc/sys/vm/nr_hugepages"])?;
    // Whatever is not tmpfs: this guest has no disk.
    scene
        .guest
        .check(ROOT, ["sh", "-c", "mkdir /other && mount -t ramfs none /other && chmod 777 /other"])?;
    let trusted = STRICT.map(|(kind, verdict)| (kind, if TRUSTED.contains(&kind) { Works } else { verdict }));
    for (level, uid, table) in [("strict", STRICT_UID, STRICT), ("trusted", TRUSTED_UID, trusted)] {
        println!("-- {level}");
        let told = scene.guest.check(uid, "svm-agent run -- kinds /dev/shm /other")?;
        compare(&told, &table).with_context(|| format!("{level}\n{}", scene.svmd.log()))?;
        // The next one has files of its own there.
        scene.guest.check(ROOT, "rm -f /dev/shm/kinds /other/kinds")?;
    }
    scene.guest.power_off()
}

/// Whether a program's lines say of each kind what the table says.
fn compare(told: &str, table: &[(&str, Verdict)]) -> Result<()> {
    let mut cells: BTreeMap<&str, &str> = told.lines().filter_map(|line| line.split_once(": ")).collect();
    let mut differences = vec![];
    for (kind, verdict) in table {
        let said = cells.remove(kind).unwrap_or("nothing is said");
        println!("{kind}: {said}");
        let right = match verdict {
            Works => said == "works",
            Refused(remedy) => said.starts_with("refused: ") && said.contains(remedy),
        };
        if !right {
            differences.push(format!("{kind}: {said}"));
        }
    }
    ensure!(cells.is_empty(), "kinds that no cell is about: {cells:?}");
    ensure!(differences.is_empty(), "not as the table has it:\n{}", differences.join("\n"));
    Ok(())
}

pub fn processes_live_and_no_byte_is_stale(vm: &Vm) -> Result<()> {
    let number = |name: &str, other: u64| std::env::var(name).map_or(Ok(other), |text| text.parse());
    let seconds = number("SVM_LIFE_SECONDS", LIFE_SECONDS)?;
    let seed = number("SVM_SEED", 1)?;
    println!("SVM_LIFE_SECONDS={seconds} SVM_SEED={seed}");
    let scene = Scene::set(vm, "life")?;
    let command = format!("svm-agent run -- life run {seconds} {LIVING} {seed}");
    let living = scene.guest.spawn(FIRST_UID, command)?;
    let output = living.wait().with_context(|| format!("seed {seed}\n{}", scene.svmd.log()))?;
    println!("{}", output.stdout);
    ensure!(output.code == Some(0), "seed {seed}: {output}\n{}", scene.svmd.log());
    let last = output.stdout.lines().last().unwrap_or_default();
    let told: Value = serde_json::from_str(last).with_context(|| format!("it says {output}"))?;
    ensure!(told["bad"] == 0 && told["lives"].as_u64() > Some(u64::from(LIVING)), "seed {seed}: {told}");
    scene.guest.power_off()
}
