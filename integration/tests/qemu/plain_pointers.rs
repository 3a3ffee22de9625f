//! Ordinary programs in a real guest, started by `svm-agent run`: memory of every kind, and processes that live.

use anyhow::{Context, Result, ensure};
use integration::binaries::build_host;
use integration::initramfs::FIRST_UID;
use integration::ordinary::{Ordinary, Scene, TIMEOUT, of_one, sources};
use integration::provision::Vm;
use integration::qemu::ROOT;
use integration::qemu::channel::{Output, Process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// What must become of a kind of memory.
#[derive(Clone, Copy)]
enum Verdict {
    Works,
    /// With a message that says which memory it is, and what to do: these words.
    Refused(&'static str, &'static str),
}
use Verdict::{Refused, Works};

/// What makes a mapping one that GPUs reach.
const MAP_IT: &str = "map it readable and writable";
const READ_IT: &str = "read the file into memory of malloc";

/// README's table, where the agent trusts no process.
const STRICT: [(&str, Verdict); 50] = [
    ("malloc, small", Works),
    ("malloc, large", Works),
    ("realloc", Works),
    ("aligned_alloc", Works),
    ("malloc before main", Works),
    ("global with a value", Works),
    ("global without", Works),
    ("linked library, global with a value", Works),
    ("linked library, global without", Works),
    ("linked library, block of its constructor", Works),
    ("loaded library, global with a value", Works),
    ("loaded library, global without", Works),
    ("loaded library, block of its constructor", Works),
    (
        "library loaded beside a thread, global with a value",
        Refused("mapping of /lib/liblate.so", "load it before the first thread"),
    ),
    ("stack of a thread, upper 256 KiB", Works),
    ("stack of a thread, deeper", Refused("256 KiB", "use malloc")),
    ("stack of main, 256 KiB", Refused("main thread's stack", "pthread_create")),
    ("stack of main, deeper", Refused("main thread's stack", "pthread_create")),
    ("mmap, anonymous", Works),
    ("mmap, anonymous, 16 MiB", Works),
    ("mmap, anonymous and shared", Works),
    ("huge pages (MAP_HUGETLB)", Refused("MAP_HUGETLB", "MFD_HUGETLB")),
    ("huge pages (MFD_HUGETLB)", Works),
    ("huge pages (MADV_HUGEPAGE)", Works),
    ("PROT_NONE, made writable", Refused("PROT_NONE", MAP_IT)),
    ("PROT_READ, made writable", Refused("read-only", MAP_IT)),
    ("protected, made writable again", Refused("mprotect", "map it anew")),
    ("PROT_EXEC", Refused("PROT_EXEC", MAP_IT)),
    ("MAP_NORESERVE, 64 MiB", Works),
    ("MAP_NORESERVE, more", Refused("MAP_NORESERVE", "without MAP_NORESERVE")),
    ("MAP_GROWSDOWN", Refused("MAP_GROWSDOWN", "without MAP_GROWSDOWN")),
    ("MAP_STACK", Refused("MAP_STACK", "without MAP_STACK")),
    ("mmap, beyond the agent's limit", Refused("limit", "--process-memory")),
    ("sbrk", Refused("sbrk", "use malloc")),
    ("memfd", Works),
    ("POSIX shared memory", Works),
    ("System V shared memory", Refused("System V", "shm_open")),
    ("file on tmpfs, shared", Works),
    ("file on tmpfs, shared, read only", Refused("shared mapping of /dev/shm/kinds", "mapped to be written")),
    ("file on tmpfs, private", Works),
    ("file on tmpfs, private, read only", Refused("it is a mapping of /dev/shm/kinds", READ_IT)),
    ("file on tmpfs, private, 64 MiB", Works),
    ("file on tmpfs, private, more", Refused("it is a mapping of /dev/shm/kinds", READ_IT)),
    ("file on another file system, shared", Refused("shared mapping of /other/kinds", READ_IT)),
    ("file on another file system, shared, read only", Refused("shared mapping of /other/kinds", READ_IT)),
    ("file on another file system, private", Works),
    ("file on another file system, private, read only", Refused("it is a mapping of /other/kinds", READ_IT)),
    ("file on another file system, private, 64 MiB", Works),
    ("file on another file system, private, more", Refused("it is a mapping of /other/kinds", READ_IT)),
    ("shared by parent and child", Works),
];

/// Kinds that work besides where the agent trusts the process; the others are as above.
const TRUSTED: [&str; 5] =
    ["stack of main, 256 KiB", "huge pages (MAP_HUGETLB)", "MAP_STACK", "sbrk", "System V shared memory"];

/// Kinds that work besides where the program asks for a device only when it has them, on either level.
const LATE: [&str; 4] = [
    "PROT_NONE, made writable",
    "PROT_READ, made writable",
    "protected, made writable again",
    "library loaded beside a thread, global with a value",
];
/// As above, where the process is trusted: of the stack what lies around the frame that asks.
const LATE_TRUSTED: [&str; 1] = ["stack of main, deeper"];

/// What two programs find that were started by themselves, whatever the agent trusts.
const TWO_PROGRAMS: [(&str, Verdict); 2] =
    [("POSIX shared memory of two programs", Works), ("tmpfs file of two programs", Works)];

/// A user whose processes are trusted, and one whose are not.
const TRUSTED_UID: u32 = FIRST_UID;
const STRICT_UID: u32 = FIRST_UID + 1;

/// How long processes live unless `SVM_LIFE_SECONDS` says otherwise. `SVM_SEED` draws other lives.
const LIFE_SECONDS: u64 = 30;
/// Longest that the last lives, what was never done by then, and what is left may take besides.
const LIFE_PATIENCE: Duration = Duration::from_secs(180);
const LIVING: u32 = 5;
const LIVING_TRUSTED: u32 = 3;
/// What must be done at least once, as `life` calls it.
const DEEDS: [&str; 26] = [
    "mmap",
    "mmap, shared",
    "malloc",
    "malloc, large",
    "free",
    "munmap",
    "munmap, a hole",
    "by number",
    "mmap over",
    "mremap",
    "mremap to a place",
    "realloc",
    "MADV_DONTNEED",
    "MADV_FREE",
    "MADV_REMOVE",
    "mprotect",
    "mprotect back",
    "sbrk up",
    "sbrk down",
    "fork",
    "exec",
    "kill",
    "gone in use",
    "refused",
    "bytes looked at by devices",
    "bytes filled by devices",
];
/// By processes that are trusted.
const TRUSTED_DEEDS: [&str; 2] = ["huge page", "huge page gone"];

pub fn every_kind_of_memory(vm: &Vm) -> Result<()> {
    let scene = Scene::trusting(vm, "kinds", &programs()?, TRUSTED_UID, TIMEOUT)?;
    scene.guest.check(ROOT, ["sh", "-c", "echo 8 > /proc/sys/vm/nr_hugepages"])?;
    // Whatever is not tmpfs: this guest has no disk.
    scene
        .guest
        .check(ROOT, ["sh", "-c", "mkdir /other && mount -t ramfs none /other && chmod 777 /other"])?;
    let trusted = STRICT.map(|(kind, verdict)| (kind, if TRUSTED.contains(&kind) { Works } else { verdict }));
    for (level, uid, table) in [("strict", STRICT_UID, STRICT), ("trusted", TRUSTED_UID, trusted)] {
        let works_late = |kind| LATE.contains(&kind) || uid == TRUSTED_UID && LATE_TRUSTED.contains(&kind);
        let late = table.map(|(kind, verdict)| (kind, if works_late(kind) { Works } else { verdict }));
        for (when, table) in [("all", table), ("late", late)] {
            println!("-- {level}, {when}");
            let command =
                format!("svm-agent run -- kinds {when} /dev/shm /other /lib/libloaded.so /lib/liblate.so");
            let told = scene.guest.check(uid, command)?;
            compare(&told, &table).with_context(|| format!("{level}, {when}\n{}", scene.svmd.log()))?;
            // The next one has files of its own there.
            scene.guest.check(ROOT, "rm -f /dev/shm/kinds /other/kinds")?;
        }
    }
    two_programs_share(&scene).with_context(|| scene.svmd.log())?;
    examples_run(&scene).with_context(|| scene.svmd.log())?;
    scene.guest.power_off()
}

/// What looks at its memory, with libraries to link and load, and the examples of the client library.
fn programs() -> Result<Ordinary> {
    let built = build_host(&[])?;
    let mut programs = Ordinary::new(&built)?;
    let [program, gpu] = sources("kinds");
    let source = program.with_file_name("kinds_library.c");
    let linked = programs.library("linked", &source)?;
    programs.library("loaded", &source)?;
    programs.library("late", &source)?;
    programs.compile(&[program, gpu, linked])?;
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-agent/c/examples");
    programs.compile(&[examples.join("async.c")])?;
    programs.program(built.get("list")?)?;
    Ok(programs)
}

/// Two programs of a user, started one after the other, have memory by its name; meanwhile `svm-agent` says who they are.
fn two_programs_share(scene: &Scene) -> Result<()> {
    let users = [("strict", STRICT_UID), ("trusted", TRUSTED_UID)];
    let mut firsts = vec![];
    for (level, uid) in users {
        let mut first = scene.guest.spawn(uid, "svm-agent run -- kinds first /dev/shm")?;
        let memory = wait_for_memory(&mut first)?;
        firsts.push((level, uid, first, memory));
    }
    for (level, uid, first, memory) in &firsts {
        is_shown(scene, first.pid(), *uid, level)?;
        is_mapped(scene, first.pid(), memory)?;
    }
    for (level, uid, first, _) in firsts {
        println!("-- {level}");
        compare(&scene.guest.check(uid, "svm-agent run -- kinds second /dev/shm")?, &TWO_PROGRAMS)
            .with_context(|| format!("{level}, second; the first: {}", first.output()))?;
        first.write_line("go on")?;
        let output = first.wait()?;
        ensure!(output.code == Some(0), "{level}, first: {output}");
        compare(&output.stdout, &TWO_PROGRAMS).with_context(|| format!("{level}, first"))?;
    }
    Ok(())
}

/// Where a program that waits has memory.
fn wait_for_memory(program: &mut Process) -> Result<Vec<u64>> {
    let mut memory = vec![];
    program.wait_for_line(|line| {
        memory.extend(line.strip_prefix("it has 0x").map(|at| u64::from_str_radix(at, 16)));
        (line == "it waits").then_some(())
    })?;
    let memory = memory.into_iter().collect::<Result<Vec<_>, _>>()?;
    ensure!(memory.len() == 4, "it has memory at {memory:x?}");
    Ok(memory)
}

/// Whether people can read in both tables how a process is trusted.
fn is_shown(scene: &Scene, pid: u32, uid: u32, level: &str) -> Result<()> {
    let status = scene.guest.check(ROOT, "svm-agent status")?;
    ensure!(status.contains("trust: as /etc/svm-agent.toml says"), "{status}");
    for table in [status, scene.guest.check(ROOT, "svm-agent ps")?] {
        let row = row_of(&table, pid).with_context(|| format!("no process {pid}:\n{table}"))?;
        let has = |column: &str, value: &str| row.get(column).is_some_and(|found| *found == value);
        let shown = has("uid", &uid.to_string()) && has("trust", level) && has("program", "kinds");
        ensure!(shown && !has("bytes", "0"), "process {pid} is one of user {uid}, {level}:\n{table}");
    }
    Ok(())
}

/// The words of a process' line in a table, by the names in the table's first line.
fn row_of(table: &str, pid: u32) -> Option<BTreeMap<&str, &str>> {
    let mut lines = table.lines().map(|line| line.split_whitespace());
    let names: Vec<&str> = lines.find(|words| words.clone().any(|word| word == "pid"))?.collect();
    let mut rows = lines.map(|words| names.iter().copied().zip(words).collect::<BTreeMap<_, _>>());
    rows.find(|row| row.get("pid").is_some_and(|found| *found == pid.to_string()))
}

/// Whether people can read that a process has memory in reach at these addresses.
fn is_mapped(scene: &Scene, pid: u32, memory: &[u64]) -> Result<()> {
    let map = scene.guest.check(ROOT, format!("svm-agent map {pid}"))?;
    ensure!(map.starts_with(&format!("process {pid} (kinds), context ")), "{map}");
    let ranges = map.split_whitespace().filter_map(|word| {
        let (start, end) = word.split_once("..")?;
        let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        Some(number(start)?..number(end)?)
    });
    for address in memory {
        ensure!(ranges.clone().any(|range| range.contains(address)), "{address:#x} is not in\n{map}");
    }
    Ok(())
}

/// The examples on this guest's two devices, as its users start them.
fn examples_run(scene: &Scene) -> Result<()> {
    let told = scene.guest.check(STRICT_UID, "svm-agent run -- async 8")?;
    ensure!(told.matches(" ok\n").count() == 8 && told.ends_with("jobs=8 wrong=0\n"), "async: {told}");
    let told = scene.guest.check(STRICT_UID, "svm-agent run -- list 1000 7")?;
    for (way, device) in [("blocking", 0), ("blocking", 1), ("together", 0), ("together", 1)] {
        let walk = format!("{way} device={device} name=soft{device} nodes=1000 ");
        let right = |line: &str| line.starts_with(&walk) && line.ends_with(" ok");
        ensure!(told.lines().any(right), "list: no {walk}in {told}");
    }
    Ok(())
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
            Refused(what, remedy) => {
                said.starts_with("refused: ") && said.contains(what) && said.contains(remedy)
            }
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
    let timeout = Duration::from_secs(seconds) + LIFE_PATIENCE;
    let scene = Scene::trusting(vm, "life", &of_one("life")?, TRUSTED_UID, timeout)?;
    scene.guest.check(ROOT, ["sh", "-c", "echo 8 > /proc/sys/vm/nr_hugepages"])?;
    let lived = live(&scene, seconds, seed).and_then(|()| nothing_is_left(&scene));
    lived.with_context(|| {
        format!(
            "SVM_SEED={seed}\n-- svm-agent --\n{}\n-- svmd --\n{}",
            scene.agent.output(),
            scene.svmd.log()
        )
    })?;
    scene.agent.kill(15)?;
    let ended = scene.agent.wait()?;
    ensure!(ended.code == Some(0) && !ended.stderr.contains("panicked"), "the agent: {ended}");
    // Said when a serving process had to be replaced.
    ensure!(ended.stderr.matches("serving processes at").count() == 1, "the agent: {ended}");
    ensure!(!scene.svmd.log().contains("panic"), "svmd: {}", scene.svmd.log());
    scene.guest.power_off()
}

/// Processes of a user who is trusted, beside those of one who is not.
fn live(scene: &Scene, seconds: u64, seed: u64) -> Result<()> {
    let run = |level: &str, living: u32, seed: u64| {
        format!("svm-agent run -- life run {level} {seconds} {living} {seed}")
    };
    let trusted = run("trusted", LIVING_TRUSTED, seed.wrapping_add(1));
    // What such processes pin, forked children included, is more than a user may by default.
    let unlimited = format!("ulimit -l unlimited && exec su user{TRUSTED_UID} -c 'exec {trusted}'");
    let strict = scene.guest.spawn(STRICT_UID, run("strict", LIVING, seed))?;
    let trusted = scene.guest.spawn(ROOT, ["sh", "-c", &unlimited])?;
    let outputs = [("strict", strict.wait()?, &[][..]), ("trusted", trusted.wait()?, &TRUSTED_DEEDS[..])];
    for (level, output, _) in &outputs {
        println!("-- {level}\n{}", output.stdout);
    }
    for (level, output, more) in outputs {
        well_lived(&output, more).with_context(|| format!("{level}: {output}"))?;
    }
    Ok(())
}

/// All that was to be done was done, and nothing went wrong.
fn well_lived(output: &Output, more: &[&str]) -> Result<()> {
    let complaints = ["WRONG", "FAILED"].map(|word| output.stdout.matches(word).count());
    // The library would say there that memory is out of reach.
    ensure!(complaints == [0, 0] && output.stderr.is_empty(), "something was wrong");
    let last = output.stdout.lines().last().unwrap_or_default();
    let told: Value = serde_json::from_str(last).context("no counts")?;
    ensure!(output.code == Some(0) && told["bad"] == 0, "some ended badly");
    for deed in DEEDS.iter().chain(more) {
        ensure!(told["deeds"][deed].as_u64() > Some(0), "never done: {deed}");
    }
    Ok(())
}

/// Of all contexts and all pinned memory, with the agent and with the daemon.
fn nothing_is_left(scene: &Scene) -> Result<()> {
    let deadline = Instant::now() + LIFE_PATIENCE;
    loop {
        let status: Value = serde_json::from_str(&scene.guest.check(ROOT, "svm-agent status --json")?)?;
        let theirs = scene.svmd.guest("vm0")?["status"].take();
        let zeros = ["contexts", "retiring", "pending_faults"].iter().all(|name| theirs[name] == 0);
        if status["contexts"] == json!([]) && status["pinned_bytes"] == 0 && zeros {
            ensure!(status["state"] == "open", "the agent: {status}");
            ensure!(scene.svmd.stat("/gpu_vms")? == 0, "GPU VMs are left");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left: {status}; svmd has {theirs}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
