//! Processes that die at every step, join what is not theirs, inherit a socket, never read, or take all that there is.
//!
//! Where it takes another process, a test starts itself again and says in its environment what to do.

use crate::hostile::{
    ARENAS, CLIENTS, CONTEXT_BYTES, EACCES, EINVAL, ENOENT, ENOSPC, PAGE, PARTS, Scene, Session, TOTAL_BYTES,
    VICTIM_VA, alone, bind, create, cut, free, hello, import, message, submit, this_test,
};
use crate::lacking::lacking;
use crate::mock::{eventually, file};
use guest_agent::agent::{ARENA_OVERHEAD_BYTES, ContextReport};
use guest_agent::message::*;
use rustix::process::{Signal, getpid, kill_process};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_INVAL_DONE, EVENT_JOB_DONE};

/// Where the agent listens, in the environment of a process that a test has started.
const SOCKET: &str = "SVM_TEST_SOCKET";
const STEP: &str = "SVM_TEST_STEP";
const VA: u64 = 0x4000_0000;

/// The socket, if this process was started to be hostile.
fn hostile() -> Option<PathBuf> {
    std::env::var_os(SOCKET).map(PathBuf::from)
}

fn number(variable: &str) -> u64 {
    std::env::var(variable).unwrap().parse().unwrap()
}

fn start(scene: &Scene, test: &str, step: u64) -> Child {
    let mut command = this_test(test);
    command.env(SOCKET, scene.socket()).env(STEP, step.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Says what it was told to and dies at `step`: before, or with the message sent and not answered.
fn die_at(path: &std::path::Path, step: u64) {
    let mut now = 0;
    let mut here = || {
        if now == step {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
        now += 1;
    };
    here();
    let silent = Session::silent(path);
    here();
    silent.socket.send(&[&hello(0)], &[], true).unwrap();
    here();
    let session = Session::open(path);
    let id = session.arena(VA, 8 * PAGE).0;
    let memory = file(2 * PAGE);
    let steps = [
        (create(VA + 64 * PAGE, 64 * PAGE), false),
        (import(VA + 32 * PAGE, 2 * PAGE, 0), true),
        (bind(VA), false),
        (submit(16, 0, &[0xff; 64]), false),
        (cut(id, PAGE, PAGE), false),
        (cut(id, 3 * PAGE, 2 * PAGE), false),
        (free(id), false),
        (vec![0xff; 7], false),
    ];
    for (bytes, brings) in &steps {
        here();
        let fds = [memory.as_fd()];
        session.socket.send(&[bytes], if *brings { &fds } else { &[] }, true).unwrap();
        here();
        session.hear();
    }
    here();
}
/// Steps of [`die_at`].
const STEPS: u64 = 3 + 2 * 8 + 1;
/// The step after the first message that invalidates.
const FIRST_CUT: u64 = 3 + 2 * 4 + 1;

/// With the device's part done at once, and while an invalidation is not: nothing is given back before the device says
/// that it is through with the context.
#[test]
fn processes_die_at_every_step() {
    const TEST: &str = "hostile_lives::processes_die_at_every_step";
    if let Some(path) = hostile() {
        return die_at(&path, number(STEP));
    }
    if !alone(TEST) {
        return;
    }
    let scene = Scene::new();
    for (hold, step) in (0..STEPS).flat_map(|step| [(false, step), (true, step)]) {
        scene.mock.script(|script| (script.hold_done, script.hold_retired) = (hold, hold));
        let mut child = start(&scene, TEST, step);
        if hold && step > FIRST_CUT {
            // It waits for an invalidation that is not done, and dies of that.
            let waits = |id| scene.mock.look().log.contains(&format!("invalidate {id}"));
            eventually("a cut", || others(&scene).iter().any(|context| waits(context.ctx_id)));
            child.kill().unwrap();
        }
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.signal(), Some(9), "step {step}: {ended:?}");
        if hold {
            // Those that it was told of before it died; no one is given back, because no cut is ever done.
            let made = [3, 5, 7].iter().filter(|&&told| step >= told).count();
            let_go_once_retired(&scene, made);
        }
        scene.only_victim_is_left();
        scene.check(&(hold, step));
    }
    scene.end();
}

/// Contexts of all but the victim.
fn others(scene: &Scene) -> Vec<ContextReport> {
    let contexts = scene.agent.status().contexts;
    contexts.into_iter().filter(|context| context.ctx_id != scene.victim()).collect()
}

/// The processes are dead and the device is not through with their contexts: all memory is held until it says so.
fn let_go_once_retired(scene: &Scene, made: usize) {
    eventually("contexts are on their way out", || {
        let left = others(scene);
        for context in &left {
            // Who waits for an invalidation goes on.
            let id = context.ctx_id;
            scene.mock.script(|script| {
                let seq = script.contexts.get(&id).copied().unwrap_or(0);
                script.notice(EVENT_INVAL_DONE, id, seq);
            });
        }
        left.iter().all(|context| context.state == "retiring")
    });
    // What is let go early is so after a moment.
    scene.check_victim(&"death");
    let held = || scene.memory.len() - 1;
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(held() >= made, "{} of {made} arenas are held, and devices may reach all", held());
    // For the witnesses.
    scene.mock.script(|script| (script.hold_done, script.hold_retired) = (false, false));
    // One that is made as it dies may come late.
    eventually("contexts are gone", || {
        let left = others(scene);
        for context in &left {
            scene.mock.script(|script| script.notice(EVENT_CONTEXT_RETIRED, context.ctx_id, 0));
        }
        left.is_empty()
    });
}

/// Contexts of other processes do not exist: neither one that lives, nor one that is gone.
#[test]
fn contexts_of_other_processes_are_not_joined() {
    const TEST: &str = "hostile_lives::contexts_of_other_processes_are_not_joined";
    if let Some(path) = hostile() {
        let mine = Session::open(&path).ctx_id;
        for ctx_id in (1..64).chain([0x00ff_ffff, u32::MAX]).filter(|ctx_id| *ctx_id != mine) {
            let session = Session::silent(&path);
            assert_eq!(session.status(&hello(ctx_id), &[]), Some(ENOENT), "context {ctx_id}");
        }
        return;
    }
    if !alone(TEST) {
        return;
    }
    let scene = Scene::new();
    let ended = start(&scene, TEST, 0).wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    scene.check(&"joining");
    scene.end();
}

/// A child has the socket and not the right: whatever it sends ends the context, and does nothing else.
#[test]
fn inherited_socket_gives_no_right_to_anything() {
    if !alone("hostile_lives::inherited_socket_gives_no_right_to_anything") {
        return;
    }
    let scene = Scene::new();
    let said = [hello(0), message(DEVICES, &[]), create(VA, PAGE), free(2), cut(2, 0, PAGE), bind(VA)];
    for bytes in &said {
        let session = scene.session();
        let at = scene.directory.path().join("message");
        std::fs::write(&at, bytes).unwrap();
        let socket = session.socket.as_fd().try_clone_to_owned().unwrap();
        let cat = std::process::Command::new("/bin/cat").arg(&at).stdout(Stdio::from(socket)).status();
        assert!(cat.unwrap().success());
        let told = session.hear().map(|told| told.status);
        assert_eq!((told, session.hear().is_none()), (Some(EACCES), true));
        scene.check(bytes);
    }
    scene.end();
}

/// Two processes send and never read, while their faults come and their jobs end.
#[test]
fn process_that_never_reads_delays_nobody() {
    if !alone("hostile_lives::process_that_never_reads_delays_nobody") {
        return;
    }
    let scene = Scene::new();
    let deaf = [scene.session(), scene.session()];
    let [asks, gets] = &deaf;
    for session in &deaf {
        session.arena(VA, 8 * PAGE);
    }
    // As many questions as there is room for: the answers fill the other way, then nobody reads the questions.
    while asks.socket.send(&[&message(DEVICES, &[])], &[], false).is_ok() {}
    for round in 0..200 {
        scene.mock.script(|script| {
            for _ in 0..100 {
                script.notice(EVENT_JOB_DONE, gets.ctx_id, 1);
            }
            script.fault(asks.ctx_id, VA + (round % 8) * PAGE);
            script.fault(gets.ctx_id, VA + (round % 8) * PAGE);
            script.fault(gets.ctx_id, VICTIM_VA);
        });
        scene.check(&round);
    }
    let alive = |ctx_id| scene.agent.status().contexts.iter().any(|c| c.ctx_id == ctx_id);
    eventually("who does not take its records is gone", || !alive(gets.ctx_id));
    assert!(alive(asks.ctx_id), "who only asks keeps what it has");
    drop(deaf);
    scene.end();
}

#[test]
fn limits_are_reached_and_others_go_on() {
    if !alone("hostile_lives::limits_are_reached_and_others_go_on") {
        return;
    }
    let scene = Scene::new();
    let greedy = scene.session();
    let mut ids = vec![];
    for n in 0..ARENAS as u64 {
        ids.push(greedy.arena(VA + n * 64 * PAGE, 32 * PAGE).0);
    }
    assert_eq!(greedy.status(&create(VICTIM_VA, PAGE), &[]), Some(ENOSPC), "too many arenas");
    scene.check(&"arenas");
    let mut cuts = vec![];
    for n in 0..PARTS as u64 {
        cuts.push(greedy.status(&cut(ids[0], (2 * n + 1) * PAGE, PAGE), &[]));
    }
    // Each cut makes one part more, and one that is there until no engine uses it.
    let more = PARTS - ARENAS - 1;
    assert!(cuts[..more].iter().all(|status| *status == Some(0)), "{cuts:?}");
    assert_eq!(cuts[more], Some(ENOSPC), "too many parts");
    scene.check(&"parts");
    for id in ids {
        assert_eq!(greedy.status(&free(id), &[]), Some(0));
    }
    let whole = greedy.arena(VA, CONTEXT_BYTES).0;
    assert_eq!(greedy.status(&create(VICTIM_VA, PAGE), &[]), Some(ENOSPC), "too many bytes");
    // What was cut counts as long as it is held.
    assert_eq!(greedy.status(&cut(whole, 0, CONTEXT_BYTES - PAGE), &[]), Some(0));
    assert_eq!(greedy.status(&create(VICTIM_VA, PAGE), &[]), Some(ENOSPC), "still held");
    scene.check(&"bytes");
    eventually("the witness is gone", || others(&scene).len() == 1);

    // All that there is for all: who has memory keeps it, and there is room again once they are gone.
    let room = TOTAL_BYTES - CONTEXT_BYTES - 4 * PAGE - 4 * ARENA_OVERHEAD_BYTES;
    let others = [scene.session(), scene.session()];
    others[0].arena(VA, CONTEXT_BYTES);
    others[1].arena(VA, room - CONTEXT_BYTES);
    let late = scene.session();
    assert_eq!(late.status(&create(VA, PAGE), &[]), Some(ENOSPC), "too many bytes in all");
    scene.check_victim(&"bytes in all");
    drop((greedy, others, late));
    scene.only_victim_is_left();
    scene.check(&"room again");

    let crowd: Vec<Session> = (1..CLIENTS).map(|_| scene.session()).collect();
    let beyond = Session::silent(&scene.socket());
    assert_eq!(beyond.status(&hello(0), &[]), Some(ENOSPC), "too many connections");
    assert!(beyond.hear().is_none(), "told, and no more");
    scene.check_victim(&"connections");
    drop((crowd, beyond));
    scene.only_victim_is_left();
    scene.end();
}

/// One user takes all memory that it can have; there is some left for another one.
#[test]
fn one_user_leaves_memory_for_others() {
    const TEST: &str = "hostile_lives::one_user_leaves_memory_for_others";
    if let Some(path) = hostile() {
        let mut sessions = vec![];
        loop {
            sessions.push(Session::open(&path));
            let last = &sessions[sessions.len() - 1];
            let made = (1..=CONTEXT_BYTES / PAGE)
                .rev()
                .find(|pages| last.status(&create(VA, pages * PAGE), &[]) == Some(0));
            if made.is_none() || sessions.len() == CLIENTS / 2 {
                println!("taken");
                std::thread::sleep(std::time::Duration::from_secs(3600));
            }
        }
    }
    if !alone(TEST) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return lacking("one user leaves memory for others (needs root, for another user)");
    }
    let scene = Scene::with_user_limit(TOTAL_BYTES / 4 * 3);
    let mut command = this_test(TEST);
    command.env(SOCKET, scene.socket()).env(STEP, "0").uid(65534).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("taken")));
    let told = scene.session().status(&create(VA, PAGE), &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(told, Some(0), "of another user");
}

/// A second connection has the memory of the first, and no more when the first is gone.
#[test]
fn joined_connection_outlives_nothing() {
    if !alone("hostile_lives::joined_connection_outlives_nothing") {
        return;
    }
    let scene = Scene::new();
    let owner = scene.session();
    let id = owner.arena(VA, 4 * PAGE).0;
    let joined = Session::silent(&scene.socket());
    assert_eq!(joined.status(&hello(owner.ctx_id), &[]), Some(0));
    assert_eq!(joined.status(&cut(id, 0, PAGE), &[]), Some(0));
    assert_eq!(owner.status(&cut(id, 0, PAGE), &[]), Some(ENOENT), "cut by the other");
    assert_eq!(joined.status(&free(id), &[]), Some(0));
    assert_eq!(owner.status(&free(id), &[]), Some(ENOENT), "given back by the other");
    owner.arena(VA, 4 * PAGE);
    drop(owner);
    scene.only_victim_is_left();
    for bytes in [create(VA, PAGE), free(id + 1), cut(id + 1, 0, PAGE), submit(16, 0, &[0xff; 64])] {
        assert_eq!(joined.status(&bytes, &[]), Some(-32));
    }
    assert_eq!(joined.status(&[0xff; 20], &[]), Some(EINVAL));
    drop(joined);
    scene.end();
}
