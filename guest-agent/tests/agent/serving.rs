//! Contexts beside each other in the agent: one that holds a thread up, and one with thousands of faults. What others wait
//! for is counted in answers, not in time.

use crate::agent::{Bench, TestSink};
use crate::mock::{Script, eventually};
use guest_agent::agent::{AgentOptions, EventSink, Owner};
use std::sync::{Arc, Condvar, Mutex};
use virtio_gpu_svm::protocol::event::EVENT_JOB_DONE;

const VA: u64 = 0x10_0000;
const PAGES: u64 = 64;
/// Faults of a storm.
const STORM: u64 = 1500;
/// Answers that the control queue holds: of its 256 descriptors each takes two.
const IN_RING: usize = 128;

/// Holds whoever brings a record up until it is opened.
#[derive(Default)]
struct Gate {
    /// Records that have come, and whether it is open.
    state: Mutex<(usize, bool)>,
    opened: Condvar,
}

impl EventSink for Gate {
    fn push(&self, _record: &[u8; 96]) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        drop(self.opened.wait_while(state, |(_, open)| !*open).unwrap());
    }
}

/// Opens the gate, however the test ends: the agent's end waits for its threads.
struct Opener(Arc<Gate>);

impl Opener {
    fn holds(&self) -> bool {
        self.0.state.lock().unwrap().0 > 0
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().1 = true;
        self.0.opened.notify_all();
    }
}

fn bench(serving_threads: usize) -> Bench {
    Bench::new(AgentOptions { serving_threads, ..AgentOptions::default() })
}

/// A context whose next record holds a thread up.
fn gated(bench: &Bench) -> (u32, Opener) {
    let gate = Arc::new(Gate::default());
    let ctx_id = bench.agent.create_context(Owner::default(), gate.clone()).unwrap();
    (ctx_id.into(), Opener(gate))
}

/// A context with memory.
fn context(bench: &Bench) -> (u32, Arc<TestSink>) {
    let (ctx_id, sink) = bench.context();
    bench.agent.create_arena(ctx_id, VA, PAGES * 4096).unwrap();
    (ctx_id.into(), sink)
}

fn storm(script: &mut Script, ctx_id: u32) {
    for fault in 0..STORM {
        script.fault(ctx_id, VA + fault % PAGES * 4096);
    }
}

/// Answers that the device got before this one.
fn answers_before(bench: &Bench, cookie: u64) -> usize {
    bench.answered(cookie);
    bench.mock.look().answers.iter().position(|answer| answer.cookie == cookie).unwrap()
}

#[test]
fn context_that_holds_a_thread_up_does_not_delay_the_faults_of_another() {
    for threads in [2, 4] {
        let bench = bench(threads);
        let (held, opener) = gated(&bench);
        let (ctx_id, _sink) = context(&bench);
        // In one buffer, and enough for another thread to be woken.
        let cookies: Vec<u64> = bench.mock.script(|script| {
            script.notice(EVENT_JOB_DONE, held, 1);
            (0..32).map(|page| script.fault(ctx_id, VA + page * 4096)).collect()
        });
        for cookie in cookies {
            assert_eq!(bench.answered(cookie).code, 0);
        }
        eventually("a thread is held up", || opener.holds());
        drop(opener);
    }
}

/// All that a context has asked for is in the agent, and its one thread has done nothing of it yet.
#[test]
fn faults_that_wait_in_the_agent_are_answered_in_turns() {
    let bench = bench(1);
    let (held, opener) = gated(&bench);
    let ((stormy, _), (victim, _)) = (context(&bench), context(&bench));
    bench.mock.script(|script| script.notice(EVENT_JOB_DONE, held, 1));
    eventually("the thread is held up", || opener.holds());
    let cookie = bench.mock.script(|script| {
        storm(script, stormy);
        script.fault(victim, VA)
    });
    eventually("all are delivered", || bench.mock.look().undelivered() == 0);
    drop(opener);
    let before = answers_before(&bench, cookie);
    assert!(before <= 64, "{before} answers to the storm came first");
    eventually("all are answered", || bench.agent.ledger(false).answered == STORM + 1);
}

/// The answers to all that a context has asked for are on their way, and the device takes none of them yet.
#[test]
fn answers_that_wait_for_the_device_go_in_turns() {
    let bench = bench(1);
    let ((stormy, _), (victim, _), (last, _)) = (context(&bench), context(&bench), context(&bench));
    bench.mock.script(|script| {
        script.stalled = true;
        storm(script, stormy);
    });
    eventually("all are asked for", || bench.agent.ledger(false).faults == STORM);
    let cookie = bench.mock.script(|script| script.fault(victim, VA));
    eventually("so is the victim's", || bench.agent.ledger(false).faults == STORM + 1);
    // When the thread is at this one the victim's answer is on its way.
    bench.mock.script(|script| script.fault(last, VA));
    eventually("and one more", || bench.agent.ledger(false).faults == STORM + 2);
    bench.mock.script(|script| script.stalled = false);
    let before = answers_before(&bench, cookie);
    assert!(before <= IN_RING + 4, "{before} answers to the storm came first");
    eventually("all are answered", || bench.agent.ledger(false).answered == STORM + 2);
    let answers = bench.mock.look().answers.clone();
    let of_storm = answers.iter().filter(|answer| answer.ctx_id == stormy).map(|answer| answer.cookie);
    assert!(of_storm.is_sorted(), "in the order of the faults");
}
