//! The agent's core against the mock.

use crate::mock::{Mock, device, device_with, eventually, file};
use crate::virtqueue::Random;
use guest_agent::agent::{
    ARENA_OVERHEAD_BYTES, Agent, AgentOptions, Answer, ArenaMemory, ArenaPages, ContextKey, Error, EventSink,
    ImportedPages, Owner,
};
use guest_agent::driver::SvmDevice;
use guest_agent::memory_file::MemoryFile;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::event::{
    EVENT_CONTEXT_LOST, EVENT_INVAL_DONE, EVENT_JOB_DONE, EVENT_QUIET, FAULT_LAST_PAGE, FAULT_PREFETCH,
    NoticeRecord,
};
use zerocopy::FromBytes;

/// Memory whose n-th arena has pages from n * 0x100_0000, every fourth one out of line.
#[derive(Default)]
pub struct TestMemory {
    made: Mutex<u64>,
    pub released: Mutex<Vec<u64>>,
    /// What pins memory of trusted processes.
    held: Mutex<HashMap<u64, OwnedFd>>,
    /// What to refuse the next import with.
    pub refusal: Mutex<Option<io::Error>>,
    /// Where memory is made.
    pub entrance: Door,
    /// Where memory is taken back.
    door: Door,
}

/// Closed, it keeps all who come.
#[derive(Default)]
pub struct Door {
    /// Whether it is closed, and how many wait.
    state: Mutex<(bool, usize)>,
    opened: Condvar,
}

impl Door {
    pub fn set_closed(&self, closed: bool) {
        self.state.lock().unwrap().0 = closed;
        self.opened.notify_all();
    }

    pub fn waiting(&self) -> usize {
        self.state.lock().unwrap().1
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        state = self.opened.wait_while(state, |(closed, _)| *closed).unwrap();
        state.1 -= 1;
    }
}

impl TestMemory {
    /// Descriptors that pin memory of trusted processes.
    pub fn rings_held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// Arenas that were made.
    pub fn made(&self) -> u64 {
        *self.made.lock().unwrap()
    }

    fn make(&self, len: u64) -> (u64, Vec<u64>) {
        self.entrance.pass();
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let base = *made << 24;
        let pages = (0..len / 4096).map(|page| base + page * 4096 + (page / 4) * 0x10_0000).collect();
        (*made, pages)
    }
}

impl ArenaMemory for TestMemory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let (id, pages) = self.make(len);
        Ok(ArenaPages { id, fd: file(len), offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let refusal = self.refusal.lock().unwrap().take();
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let (id, pages) = self.make(file.len());
        Ok(ImportedPages { id, pages })
    }

    fn hold(&self, ring: OwnedFd) -> io::Result<u64> {
        let (id, _) = self.make(0);
        self.held.lock().unwrap().insert(id, ring);
        Ok(id)
    }

    fn release(&self, id: u64) {
        self.door.pass();
        self.held.lock().unwrap().remove(&id);
        self.released.lock().unwrap().push(id);
    }
}

#[derive(Default)]
pub struct TestSink(pub Mutex<Vec<NoticeRecord>>);

impl EventSink for TestSink {
    fn push(&self, record: &[u8; 96]) {
        self.0.lock().unwrap().push(NoticeRecord::read_from_bytes(record).unwrap());
    }
}

pub struct Bench {
    pub mock: Arc<Mock>,
    pub memory: Arc<TestMemory>,
    pub agent: Arc<Agent>,
}

impl Bench {
    pub fn new(options: AgentOptions) -> Self {
        Self::on(device(), options)
    }

    fn on((mock, device): (Arc<Mock>, Arc<SvmDevice>), options: AgentOptions) -> Self {
        let memory = Arc::new(TestMemory::default());
        let agent = Agent::start(device, memory.clone(), options).unwrap();
        Self { mock, memory, agent }
    }

    pub fn context(&self) -> (ContextKey, Arc<TestSink>) {
        let sink = Arc::new(TestSink::default());
        let owner = Owner { pid: 42, uid: 1000, name: "test".into() };
        (self.agent.create_context(owner, sink.clone()).unwrap(), sink)
    }

    pub fn answered(&self, cookie: u64) -> crate::mock::Answered {
        self.mock.answered(cookie)
    }

    fn released(&self) -> Vec<u64> {
        self.memory.released.lock().unwrap().clone()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.agent.stop();
        self.mock.end();
    }
}

#[test]
fn fault_is_answered_from_its_own_context() {
    let bench = Bench::new(AgentOptions { fault_around_pages: 8, ..AgentOptions::default() });
    let (first, _) = bench.context();
    let (second, _) = bench.context();
    bench.agent.create_arena(first, 0x10_0000, 64 * 4096).unwrap();
    bench.agent.create_arena(second, 0x10_0000, 64 * 4096).unwrap();
    for (key, base) in [(second, 2u64 << 24), (first, 1 << 24)] {
        let cookie = bench.mock.script(|script| script.fault(key, 0x10_5000));
        let answer = bench.answered(cookie);
        assert_eq!((answer.ctx_id, answer.code), (key.ctx_id(), 0));
        let runs: Vec<(u64, u64, u32)> =
            answer.runs.iter().map(|run| (run.va.get(), run.gpa.get(), run.pages.get())).collect();
        assert_eq!(runs, [(0x10_0000, base, 4), (0x10_4000, base + 0x10_4000, 4)]);
    }
    eventually("both in the ledger", || bench.agent.ledger(true).entries.len() == 2);
    let report = bench.agent.ledger(true);
    assert_eq!((report.faults, report.answered, report.refused, report.pending), (2, 2, 0, 0));
    assert!(
        report
            .entries
            .iter()
            .all(|entry| entry.code == Answer::Success && entry.pid == 42 && entry.pages == 8)
    );
}

#[test]
fn group_is_answered_once_and_whole() {
    let bench = Bench::new(AgentOptions { fault_around_pages: 1, ..AgentOptions::default() });
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 64 * 4096).unwrap();
    let (dropped, cookie) = bench.mock.script(|script| {
        let (dropped, cookie) = (script.cookie(), script.cookie());
        // The device drops this group after its first record.
        script.fault_record(key, dropped, 0x10_0000, (0, 4096));
        for n in 0..6 {
            let flags = if n == 5 { FAULT_LAST_PAGE } else { 0 };
            script.fault_record(key, cookie, 0x10_4000 + n * 4096, (flags, 4096));
        }
        (dropped, cookie)
    });
    let answer = bench.answered(cookie);
    let first = answer.runs.first().map(|run| run.va.get());
    assert_eq!((first, answer.runs.iter().map(|run| run.pages.get()).sum::<u32>()), (Some(0x10_4000), 6));
    assert_eq!(bench.agent.ledger(false).faults, 1);
    assert!(bench.mock.look().pending.contains(&dropped));
}

#[test]
fn prefetch_is_answered_with_all_that_it_asks_for() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 64 * 4096).unwrap();
    let cookie = bench.mock.script(|script| {
        let cookie = script.cookie();
        script.fault_record(key, cookie, 0x10_0000, (FAULT_LAST_PAGE | FAULT_PREFETCH, 40 * 4096));
        cookie
    });
    let answer = bench.answered(cookie);
    assert_eq!(answer.runs.iter().map(|run| run.pages.get()).sum::<u32>(), 48, "whole windows of 16 pages");
}

#[test]
fn fault_outside_every_arena_is_refused() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    let cookie = bench.mock.script(|script| script.fault(key, 0x10_1000));
    let answer = bench.answered(cookie);
    assert_eq!((answer.code, answer.runs.len()), (1, 0));
    eventually("the ledger", || bench.agent.ledger(false).refused == 1);
}

/// The device drops the faults of a context that is gone; an answer would only be stale.
#[test]
fn fault_of_no_context_is_counted_and_not_answered() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let (astray, own) = bench.mock.script(|script| (script.fault(999u32, 0x1000), script.fault(key, 0x1000)));
    bench.answered(own);
    eventually("counted", || bench.agent.ledger(false).unowned == 1);
    assert!(bench.mock.look().answers.iter().all(|answer| answer.cookie != astray));
}

#[test]
fn answer_that_raced_is_made_again() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    let cookie = bench.mock.script(|script| {
        script.refuse_answers = 3;
        script.fault(key, 0x10_0000)
    });
    assert_eq!(bench.answered(cookie).code, 0);
    eventually("the ledger", || bench.agent.ledger(true).entries.len() == 1);
    let report = bench.agent.ledger(true);
    assert_eq!((report.retries, report.entries[0].retries), (3, 3));
}

#[test]
fn stale_answer_is_counted() {
    let bench = Bench::new(AgentOptions { hold_answers: true, ..AgentOptions::default() });
    let (key, _) = bench.context();
    bench.mock.script(|script| {
        let cookie = script.fault(key, 0x1000);
        script.pending.remove(&cookie);
    });
    eventually("held", || bench.agent.ledger(false).held == 1);
    assert_eq!(bench.agent.release_answers(), 1);
    eventually("stale", || bench.agent.ledger(false).stale == 1);
}

#[test]
fn answer_took_from_its_record_to_the_doorbell() {
    let bench = Bench::new(AgentOptions { hold_answers: true, ..AgentOptions::default() });
    let (ctx_id, _) = bench.context();
    bench.agent.create_arena(ctx_id, 0x10_0000, 4096).unwrap();
    let before = Instant::now();
    bench.mock.script(|script| script.fault(ctx_id, 0x10_0000));
    eventually("held", || bench.agent.ledger(false).held == 1);
    let held = Instant::now();
    std::thread::sleep(Duration::from_millis(5));
    let least = held.elapsed();
    bench.agent.release_answers();
    eventually("answered", || bench.agent.ledger(false).answered == 1);
    let took = Duration::from_nanos(bench.agent.ledger(true).entries[0].answer_ns);
    assert!(least <= took && took <= before.elapsed(), "{least:?} held, {took:?}");
}

#[test]
fn held_answers_go_when_released() {
    let bench = Bench::new(AgentOptions { hold_answers: true, ..AgentOptions::default() });
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    let first = bench.mock.script(|script| script.fault(key, 0x10_0000));
    eventually("held", || bench.agent.ledger(false).held == 1);
    assert!(bench.mock.look().answers.is_empty());
    assert_eq!(bench.agent.release_answers(), 1);
    bench.answered(first);
    let second = bench.mock.script(|script| script.fault(key, 0x10_0000));
    bench.answered(second);
}

#[test]
fn arena_is_released_only_after_its_invalidation_is_done() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.mock.script(|script| script.hold_done = true);
    let agent = bench.agent.clone();
    let freeing = std::thread::spawn(move || agent.free_arena(key, arena.id));
    eventually("invalidated", || bench.mock.look().log.iter().any(|line| line.starts_with("invalidate")));
    // Its pages are not supplied any more, whatever the device still has.
    let cookie = bench.mock.script(|script| script.fault(key, 0x10_0000));
    assert_eq!(bench.answered(cookie).code, 1);
    assert!(bench.released().is_empty());
    bench.mock.script(|script| script.notice(EVENT_INVAL_DONE, key, 1));
    freeing.join().unwrap().unwrap();
    eventually("released", || bench.released() == [arena.id]);
    // A new arena at the same place carries the new sequence.
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    let cookie = bench.mock.script(|script| script.fault(key, 0x10_0000));
    let answer = bench.answered(cookie);
    assert_eq!((answer.code, answer.runs[0].as_of.get()), (0, 1));
}

impl Bench {
    /// What a fault is answered with: first address, first page and pages of each run; `None`: it is refused.
    fn pages_at(&self, key: ContextKey, address: u64) -> Option<Vec<(u64, u64, u32)>> {
        let cookie = self.mock.script(|script| script.fault(key, address));
        let answer = self.answered(cookie);
        let runs = answer.runs.iter().map(|run| (run.va.get(), run.gpa.get(), run.pages.get()));
        (answer.code == 0).then(|| runs.collect())
    }

    fn invalidations(&self) -> usize {
        self.mock.look().log.iter().filter(|line| line.starts_with("invalidate")).count()
    }
}

/// What is cut away is supplied no more, at once; its addresses are free when no engine can use it; its pages stay until
/// the last part has gone.
#[test]
fn part_of_an_arena_goes_before_the_rest() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4 * 4096).unwrap();
    let cut = |offset, len| bench.agent.cut_arena(key, arena.id, offset, len);
    bench.mock.script(|script| script.hold_done = true);
    std::thread::scope(|scope| {
        let cutting = scope.spawn(|| cut(4096, 4096));
        eventually("invalidated", || bench.invalidations() == 1);
        assert_eq!(bench.pages_at(key, 0x10_1000), None);
        let taken = bench.agent.create_arena(key, 0x10_1000, 4096);
        assert_eq!(taken.map_err(|error| error.status()).unwrap_err(), -17);
        assert!(!cutting.is_finished(), "an engine may still use it");
        bench.mock.script(|script| {
            script.hold_done = false;
            script.notice(EVENT_INVAL_DONE, key, 1);
        });
        cutting.join().unwrap().unwrap();
    });
    let second = bench.agent.create_arena(key, 0x10_1000, 4096).unwrap();
    assert_eq!(bench.pages_at(key, 0x10_0000), Some(vec![(0x10_0000, 1 << 24, 1)]));
    assert_eq!(bench.pages_at(key, 0x10_1000), Some(vec![(0x10_1000, 2 << 24, 1)]));
    assert_eq!(bench.pages_at(key, 0x10_3000), Some(vec![(0x10_2000, (1 << 24) + 2 * 4096, 2)]));
    assert_eq!(cut(0, 2 * 4096).unwrap_err().status(), -2, "a part is not there");
    assert_eq!(cut(0, 5 * 4096).unwrap_err().status(), -22);
    assert_eq!(cut(1, 4096).unwrap_err().status(), -22);
    assert_eq!(cut(0, 100).unwrap_err().status(), -22);
    cut(0, 4096).unwrap();
    assert_eq!((bench.released(), bench.agent.status().pinned_bytes), (vec![], 5 * 4096));
    // The last part: the arena goes, as if it had been freed.
    cut(2 * 4096, 2 * 4096).unwrap();
    eventually("released", || bench.released() == [arena.id]);
    assert_eq!(bench.agent.free_arena(key, arena.id).unwrap_err().status(), -2);
    assert_eq!(bench.agent.status().pinned_bytes, 4096);
    bench.agent.free_arena(key, second.id).unwrap();
}

/// Two connections of a process cut and free the same arena: the last one to end lets its pages go.
#[test]
fn arena_freed_while_a_part_is_being_cut_goes_once() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4 * 4096).unwrap();
    bench.mock.script(|script| script.hold_done = true);
    std::thread::scope(|scope| {
        let cutting = scope.spawn(|| bench.agent.cut_arena(key, arena.id, 4096, 4096));
        eventually("the part is on its way", || bench.invalidations() == 1);
        let freeing = scope.spawn(|| bench.agent.free_arena(key, arena.id));
        eventually("and the rest, on both sides of it", || bench.invalidations() == 3);
        bench.mock.script(|script| script.notice(EVENT_INVAL_DONE, key, 1));
        cutting.join().unwrap().unwrap();
        assert!(bench.released().is_empty());
        bench.mock.script(|script| script.notice(EVENT_INVAL_DONE, key, 3));
        freeing.join().unwrap().unwrap();
    });
    eventually("released", || bench.released() == [arena.id]);
    eventually("all is given back", || bench.agent.status().pinned_bytes == 0);
}

/// A context that ends in the middle of a cut has its memory until it is retired, and then gives it back once.
#[test]
fn context_that_ends_while_a_part_is_being_cut_gives_the_arena_back_once() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4 * 4096).unwrap();
    bench.agent.cut_arena(key, arena.id, 0, 4096).unwrap();
    bench.mock.script(|script| (script.hold_done, script.hold_retired) = (true, true));
    std::thread::scope(|scope| {
        let cutting = scope.spawn(|| bench.agent.cut_arena(key, arena.id, 2 * 4096, 4096));
        eventually("on its way", || bench.invalidations() == 2);
        bench.agent.destroy_context(key);
        assert!(matches!(cutting.join().unwrap(), Err(Error::NoContext(_))));
    });
    assert!(bench.released().is_empty());
    bench.mock.script(|script| script.notice(virtio_gpu_svm::protocol::event::EVENT_CONTEXT_RETIRED, key, 0));
    eventually("released", || bench.released() == [arena.id]);
    bench.heard();
    assert_eq!(bench.released(), [arena.id]);
}

/// An answer made from what stood there before the cut is refused, and then the access is.
#[test]
fn answer_that_raced_with_a_cut_covers_nothing_of_it() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4 * 4096).unwrap();
    let cookie = bench.mock.script(|script| {
        script.stalled = true;
        script.fault(key, 0x10_1000)
    });
    eventually("an answer is on its way", || bench.agent.ledger(false).pending == 1);
    std::thread::scope(|scope| {
        let cutting = scope.spawn(|| bench.agent.cut_arena(key, arena.id, 4096, 4096));
        // The device hears of the cut before the answer.
        bench.mock.script(|script| *script.contexts.get_mut(&key.ctx_id()).unwrap() += 1);
        bench.mock.script(|script| script.stalled = false);
        cutting.join().unwrap().unwrap();
    });
    let answer = bench.answered(cookie);
    assert_eq!((answer.code, answer.runs.len()), (1, 0));
    assert!(bench.agent.ledger(false).retries > 0);
}

#[test]
fn parts_of_arenas_are_limited() {
    let bench = Bench::new(AgentOptions { context_parts: 3, ..AgentOptions::default() });
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 8 * 4096).unwrap();
    let cut = |page: u64| bench.agent.cut_arena(key, arena.id, page * 4096, 4096);
    cut(1).unwrap();
    cut(2).unwrap();
    assert_eq!(cut(5).unwrap_err().status(), -28);
    bench.agent.create_arena(key, 0x20_0000, 4096).unwrap();
    let fourth = bench.agent.create_arena(key, 0x30_0000, 4096);
    assert_eq!(fourth.map_err(|error| error.status()).unwrap_err(), -28);
    cut(0).unwrap();
    bench.agent.create_arena(key, 0x30_0000, 4096).unwrap();
}

/// Memory that a process brings is served, cut and released as what was made for it, and counts as much.
#[test]
fn imported_arena_is_as_any_other() {
    let options = AgentOptions { context_arena_bytes: 8 * 4096, ..AgentOptions::default() };
    let bench = Bench::new(options);
    let (key, _) = bench.context();
    let brought = MemoryFile::new(file(8 * 4096), 4 * 4096, 4 * 4096).unwrap();
    let import = |key, va| bench.agent.import_arena(key, va, &brought).map_err(|error| error.status());
    let id = import(key, 0x10_0000).unwrap();
    assert_eq!(bench.pages_at(key, 0x10_1000), Some(vec![(0x10_0000, 1 << 24, 4)]));
    assert_eq!((import(key, 0x10_3000), import(key, 0x10_0001)), (Err(-17), Err(-22)));
    let second = import(key, 0x20_0000).unwrap();
    assert_eq!(import(key, 0x30_0000), Err(-28), "the quota is used up");
    bench.agent.cut_arena(key, id, 0, 4096).unwrap();
    assert_eq!(bench.pages_at(key, 0x10_0000), None);
    bench.agent.free_arena(key, id).unwrap();
    eventually("released", || bench.released() == [id]);
    // Another process may bring the same file.
    let (other, _) = bench.context();
    let third = import(other, 0x10_0000).unwrap();
    bench.agent.destroy_context(key);
    eventually("released", || bench.released() == [id, second]);
    assert!(bench.pages_at(other, 0x10_0000).is_some());
    bench.agent.free_arena(other, third).unwrap();
}

/// The cause is told to the process; nothing is left of the attempt, also where the context has ended meanwhile.
#[test]
fn import_that_fails_leaves_nothing() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let brought = MemoryFile::new(file(4096), 0, 4096).unwrap();
    for (refusal, status) in [
        (io::Error::from_raw_os_error(libc::EFAULT), -14),
        (io::Error::from(io::ErrorKind::Unsupported), -95),
        (io::Error::from(io::ErrorKind::OutOfMemory), -12),
    ] {
        *bench.memory.refusal.lock().unwrap() = Some(refusal);
        let refused = bench.agent.import_arena(key, 0x10_0000, &brought);
        assert_eq!(refused.unwrap_err().status(), status);
    }
    assert_eq!((bench.agent.status().pinned_bytes, bench.agent.status().contexts[0].arenas), (0, 0));
    bench.agent.destroy_context(key);
    assert!(matches!(bench.agent.import_arena(key, 0x10_0000, &brought), Err(Error::NoContext(_))));
}

#[test]
fn context_keeps_its_memory_until_it_is_retired() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.mock.script(|script| script.hold_retired = true);
    bench.agent.destroy_context(key);
    assert!(matches!(bench.agent.free_arena(key, arena.id), Err(Error::NoContext(_))));
    assert!(matches!(bench.agent.submit(key, &[0; 16], 0), Err(Error::NoContext(_))));
    assert_eq!(bench.agent.status().contexts[0].state, "retiring");
    assert!(bench.released().is_empty());
    bench.mock.script(|script| script.notice(virtio_gpu_svm::protocol::event::EVENT_CONTEXT_RETIRED, key, 0));
    eventually("released", || bench.released() == [arena.id]);
    assert!(bench.agent.status().contexts.is_empty());
}

#[test]
fn lost_epoch_ends_every_context_and_keeps_memory_until_quiet() {
    let bench = Bench::new(AgentOptions::default());
    let (key, sink) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.mock.script(|script| {
        script.lose_state();
        script.retiring = 1;
    });
    // Any answer tells of the new epoch.
    let submitted = bench.agent.submit(key, &[0; 16], 0);
    assert!(submitted.is_err() || submitted.is_ok_and(|response| response.status() == -32));
    eventually("a second HELLO", || {
        bench.mock.look().log.iter().filter(|line| *line == "hello").count() == 2
    });
    eventually("the process is told", || !sink.0.lock().unwrap().is_empty());
    let record = sink.0.lock().unwrap()[0];
    assert_eq!(
        (record.kind.get(), record.ctx_id.get(), record.status.get()),
        (EVENT_CONTEXT_LOST, key.ctx_id(), -32)
    );
    let refused = bench.agent.create_context(Owner::default(), sink);
    assert!(matches!(refused, Err(Error::NotOpen)));
    assert!(bench.released().is_empty());
    bench.mock.script(|script| {
        let incarnation = script.incarnation;
        script.notice(EVENT_QUIET, 0u32, incarnation.wrapping_add(1));
        script.notice(EVENT_QUIET, 0u32, incarnation);
    });
    eventually("released", || bench.released() == [arena.id]);
    eventually("open", || bench.agent.check_open().is_ok());
    bench.context();
}

impl Bench {
    /// Waits until the agent has looked at everything that the device has said so far.
    fn heard(&self) {
        let before = self.agent.ledger(false).unowned;
        eventually("heard", || {
            self.mock.script(|script| script.fault(999u32, 0x1000));
            self.agent.ledger(false).unowned > before
        });
    }

    fn hellos(&self) -> usize {
        self.mock.look().log.iter().filter(|line| *line == "hello").count()
    }
}

/// An answer of the lost life, good as it looks, does not say that all is quiet.
#[test]
fn late_answer_of_a_lost_life_is_not_taken_for_quiet() {
    let bench = Bench::new(AgentOptions::default());
    let (key, sink) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.mock.script(|script| {
        script.stalled = true;
        script.fault(key, 0x10_0000);
    });
    eventually("an answer is on its way", || bench.agent.ledger(false).pending == 1);
    bench.mock.script(|script| {
        script.epoch += 1;
        script.retiring = 1;
        script.notice(EVENT_INVAL_DONE, 0u32, 0);
    });
    eventually("told", || !sink.0.lock().unwrap().is_empty());
    bench.mock.script(|script| script.stalled = false);
    eventually("a second HELLO", || bench.hellos() == 2);
    bench.heard();
    assert!(bench.agent.check_open().is_err());
    assert!(bench.released().is_empty());
    bench.mock.script(|script| script.notice(EVENT_QUIET, 0u32, script.incarnation));
    eventually("released", || bench.released() == [arena.id]);
}

/// Else nobody would ever say that all is quiet.
#[test]
fn state_lost_again_before_quiet_begins_another_life() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let arena = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    for hellos in [2, 3] {
        bench.mock.script(|script| {
            script.lose_state();
            script.retiring = u32::from(hellos == 2);
            script.notice(EVENT_INVAL_DONE, 0u32, 0);
        });
        eventually("another HELLO", || bench.hellos() == hellos);
        if hellos == 2 {
            bench.heard();
        }
    }
    eventually("released", || bench.released() == [arena.id]);
    assert!(bench.agent.check_open().is_ok());
}

/// A process that waits for its job asks the device nothing, and still hears that the daemon has forgotten the job.
#[test]
fn silent_loss_of_state_is_noticed() {
    let pulse = Duration::from_millis(200);
    let bench = Bench::new(AgentOptions { pulse, ..AgentOptions::default() });
    let (_, sink) = bench.context();
    bench.mock.script(|script| {
        script.lose_state();
        script.devices = 1;
    });
    eventually("told", || !sink.0.lock().unwrap().is_empty());
    assert_eq!(sink.0.lock().unwrap()[0].kind.get(), EVENT_CONTEXT_LOST);
    eventually("open", || bench.agent.check_open().is_ok());
    bench.context();
    assert_eq!(bench.agent.devices().len(), 1, "the new daemon's devices are listed");
}

#[test]
fn device_that_says_nothing_any_more_is_lost() {
    let pulse = Duration::from_millis(100);
    let bench = Bench::new(AgentOptions { pulse, ..AgentOptions::default() });
    let (key, sink) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.mock.script(|script| script.stalled = true);
    eventually("failed", || bench.agent.has_failed());
    eventually("told", || !sink.0.lock().unwrap().is_empty());
    assert!(bench.agent.submit(key, &[0; 16], 0).is_err());
    assert!(bench.released().is_empty());
}

#[test]
fn number_of_arenas_is_limited() {
    let bench = Bench::new(AgentOptions { context_arenas: 2, ..AgentOptions::default() });
    let (key, _) = bench.context();
    let first = bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    bench.agent.create_arena(key, 0x20_0000, 4096).unwrap();
    let third = bench.agent.create_arena(key, 0x30_0000, 4096);
    assert_eq!(third.map_err(|error| error.status()).unwrap_err(), -28);
    bench.agent.free_arena(key, first.id).unwrap();
    bench.agent.create_arena(key, 0x30_0000, 4096).unwrap();
}

/// A fault whose pages the device will never take must not hang its job.
#[test]
fn fault_whose_pages_are_refused_for_good_ends_its_job() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 4096).unwrap();
    for refusal in [-14, -17, -28] {
        let cookie = bench.mock.script(|script| {
            (script.refuse_answers, script.refusal) = (1, refusal);
            script.fault(key, 0x10_0000)
        });
        assert_eq!(bench.answered(cookie).code, 1, "{refusal}");
    }
    eventually("the ledger", || bench.agent.ledger(false).refused == 3);
}

#[test]
fn bad_ranges_overlaps_and_quotas_are_refused() {
    let options = AgentOptions {
        context_arena_bytes: 8 * 4096,
        total_arena_bytes: 10 * 4096 + 2 * ARENA_OVERHEAD_BYTES,
        ..AgentOptions::default()
    };
    let bench = Bench::new(options);
    let (key, _) = bench.context();
    let status =
        |va: u64, len: u64| bench.agent.create_arena(key, va, len).map_or_else(|e| e.status(), |_| 0);
    for (va, len) in
        [(0, 4096), (0x1001, 4096), (0x1000, 1), (0x1000, 0), (u64::MAX - 4095, 4096), (1 << 56, 4096)]
    {
        assert_eq!(status(va, len), -22, "{va:#x} {len:#x}");
    }
    assert_eq!(status(0x10_0000, 4 * 4096), 0);
    assert_eq!(status(0x10_3000, 4096), -17);
    assert_eq!(status(0x20_0000, 5 * 4096), -28);
    let (other, _) = bench.context();
    assert!(matches!(bench.agent.create_arena(other, 0x10_0000, 7 * 4096), Err(Error::Quota { .. })));
    assert!(bench.agent.create_arena(other, 0x10_0000, 6 * 4096).is_ok());
    assert!(matches!(bench.agent.free_arena(other, 1), Err(Error::NoArena(1))));
}

#[test]
fn many_threads_share_the_rings() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 64 * 4096).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for round in 0..50 {
                    let payload = vec![0xff; 16 + 1000 * round];
                    assert_eq!(bench.agent.submit(key, &payload, 64).unwrap().status(), 0);
                }
            });
        }
        for page in 0..500u64 {
            bench.mock.script(|script| script.fault(key, 0x10_0000 + page % 64 * 4096));
        }
    });
    eventually("all answered", || bench.agent.ledger(false).answered == 500);
    assert_eq!(bench.mock.look().submissions.len(), 400);
}

/// Records of many contexts at once: each context's come to its process in their order, and every fault is answered.
#[test]
fn records_of_a_context_keep_their_order_however_many_threads_serve() {
    const CONTEXTS: usize = 12;
    const ROUNDS: u64 = 200;
    let bench = Bench::new(AgentOptions { serving_threads: 4, ..AgentOptions::default() });
    let contexts: Vec<(ContextKey, Arc<TestSink>)> = (0..CONTEXTS).map(|_| bench.context()).collect();
    for (key, _) in &contexts {
        bench.agent.create_arena(*key, 0x10_0000, 64 * 4096).unwrap();
    }
    let mut random = Random::seeded();
    let mut cookies = Vec::new();
    for round in 0..ROUNDS {
        bench.mock.script(|script| {
            for (key, _) in &contexts {
                script.notice(EVENT_JOB_DONE, *key, round);
                // A group of two, which only order keeps together.
                let (cookie, page) = (script.cookie(), random.below(63));
                let address = 0x10_0000 + page * 4096;
                script.fault_record(*key, cookie, address, (0, 4096));
                script.fault_record(*key, cookie, address + 4096, (FAULT_LAST_PAGE, 4096));
                cookies.push((*key, cookie, address));
            }
        });
    }
    eventually("all answered", || bench.agent.ledger(false).answered == cookies.len() as u64);
    for (key, sink) in &contexts {
        eventually("all records", || sink.0.lock().unwrap().len() == ROUNDS as usize);
        let values: Vec<u64> = sink.0.lock().unwrap().iter().map(|record| record.value.get()).collect();
        assert_eq!(values, (0..ROUNDS).collect::<Vec<u64>>(), "{key:?}");
    }
    let mut answers = bench.mock.look().answers.clone();
    answers.sort_by_key(|answer| answer.cookie);
    cookies.sort_by_key(|(_, cookie, _)| *cookie);
    assert_eq!(answers.len(), cookies.len());
    for (answer, (key, cookie, address)) in answers.iter().zip(cookies) {
        assert_eq!((answer.ctx_id, answer.cookie, answer.code), (key.ctx_id(), cookie, 0));
        let (first, last) = (answer.runs.first().unwrap(), answer.runs.last().unwrap());
        let end = last.va.get() + u64::from(last.pages.get()) * 4096;
        assert!(first.va.get() <= address && end >= address + 2 * 4096, "both pages of the group");
    }
}

/// A fault of the operator's holding, or of a burst, costs a command each, but not a doorbell each.
#[test]
fn answers_go_to_the_device_together() {
    // Without a pulse, which rings too.
    let pulse = Duration::from_secs(3600);
    let options = AgentOptions { hold_answers: true, pulse, ..AgentOptions::default() };
    let bench = Bench::on(device_with(false), options);
    let (key, _) = bench.context();
    bench.agent.create_arena(key, 0x10_0000, 64 * 4096).unwrap();
    let faults = || {
        bench.mock.script(|script| {
            for page in 0..24 {
                script.fault(key, 0x10_0000 + page * 4096);
            }
        });
    };
    faults();
    eventually("held", || bench.agent.ledger(false).held == 24);
    let before = bench.mock.doorbells();
    assert_eq!(bench.agent.release_answers(), 24);
    assert_eq!(bench.mock.doorbells() - before, 1);
    eventually("answered", || bench.agent.ledger(false).answered == 24);
    // As they come: the device delivers all of these in one buffer.
    let before = bench.mock.doorbells();
    faults();
    eventually("answered", || bench.agent.ledger(false).answered == 48);
    assert_eq!(bench.mock.doorbells() - before, 1);
}

/// The memory of one user's processes leaves some for those of others.
#[test]
fn memory_of_a_user_is_limited() {
    let options = AgentOptions {
        context_arena_bytes: 6 * 4096,
        user_arena_bytes: 8 * 4096 + 2 * ARENA_OVERHEAD_BYTES,
        total_arena_bytes: 20 * 4096 + 3 * ARENA_OVERHEAD_BYTES,
        ..AgentOptions::default()
    };
    let bench = Bench::new(options);
    let create = |key, va, pages| bench.create(key, va, pages);
    let context = |uid| bench.context_of(uid);
    let (first, second, other) = (context(1), context(1), context(2));
    create(first, 0x10_0000, 5).unwrap();
    assert_eq!(create(second, 0x10_0000, 4), Err(-28));
    let id = create(second, 0x10_0000, 3).unwrap();
    create(other, 0x10_0000, 6).unwrap();
    // What is still in use counts.
    bench.mock.script(|script| script.hold_retired = true);
    bench.agent.destroy_context(first);
    assert_eq!(create(second, 0x20_0000, 1), Err(-28));
    bench.agent.free_arena(second, id).unwrap();
    create(second, 0x20_0000, 3).unwrap();
}

impl Bench {
    fn context_of(&self, uid: u32) -> ContextKey {
        let owner = Owner { pid: 1, uid, name: "test".into() };
        self.agent.create_context(owner, Arc::new(TestSink::default())).unwrap()
    }

    /// Makes an arena: its id, or what the process hears.
    fn create(&self, key: ContextKey, va: u64, pages: u64) -> Result<u64, i32> {
        self.agent.create_arena(key, va, pages * 4096).map(|arena| arena.id).map_err(|error| error.status())
    }
}

/// Else memory could be made faster than it is given back. Who gives it back may have other memory when it hears so.
#[test]
fn memory_counts_until_its_maker_has_it_back() {
    let user_arena_bytes = 8 * 4096 + 2 * ARENA_OVERHEAD_BYTES;
    let bench = Bench::new(AgentOptions { user_arena_bytes, ..AgentOptions::default() });
    let (first, second) = (bench.context_of(1), bench.context_of(1));
    bench.create(first, 0x10_0000, 4).unwrap();
    let id = bench.create(second, 0x10_0000, 4).unwrap();
    let door = &bench.memory.door;
    door.set_closed(true);
    bench.agent.destroy_context(first);
    eventually("on its way back", || door.waiting() == 1);
    assert_eq!(bench.agent.status().contexts.len(), 1);
    assert_eq!(bench.create(second, 0x20_0000, 1), Err(-28));
    std::thread::scope(|scope| {
        let freeing = scope.spawn(|| bench.agent.free_arena(second, id));
        eventually("both on their way back", || door.waiting() == 2);
        assert_eq!(bench.create(second, 0x20_0000, 1), Err(-28));
        assert_eq!(bench.agent.status().pinned_bytes, 8 * 4096);
        assert!(!freeing.is_finished());
        door.set_closed(false);
        freeing.join().unwrap().unwrap();
    });
    bench.create(second, 0x20_0000, 4).unwrap();
    eventually("room for all", || bench.create(second, 0x30_0000, 4).is_ok());
}

/// Small ones cost their maker more than their bytes.
#[test]
fn arenas_of_a_user_and_of_all_are_limited_in_number() {
    let bench = Bench::new(AgentOptions { user_arenas: 2, total_arenas: 3, ..AgentOptions::default() });
    let (first, second, other) = (bench.context_of(1), bench.context_of(1), bench.context_of(2));
    let id = bench.create(first, 0x10_0000, 1).unwrap();
    bench.create(second, 0x10_0000, 1).unwrap();
    assert_eq!(bench.create(first, 0x20_0000, 1), Err(-28));
    bench.create(other, 0x10_0000, 1).unwrap();
    assert_eq!(bench.create(other, 0x20_0000, 1), Err(-28));
    bench.agent.free_arena(first, id).unwrap();
    bench.create(other, 0x20_0000, 1).unwrap();
    assert_eq!(bench.create(first, 0x20_0000, 1), Err(-28));
}

#[test]
fn what_an_arena_costs_beside_its_bytes_counts() {
    let of_each = 4096 + ARENA_OVERHEAD_BYTES;
    let options = AgentOptions {
        user_arena_bytes: 3 * of_each,
        total_arena_bytes: 4 * of_each,
        ..AgentOptions::default()
    };
    let bench = Bench::new(options);
    let (one, other) = (bench.context_of(1), bench.context_of(2));
    let made = |key| (1..10).take_while(|n| bench.create(key, n << 20, 1).is_ok()).count();
    assert_eq!((made(one), made(other)), (3, 1));
    assert_eq!(bench.agent.status().pinned_bytes, 4 * 4096);
}

/// Nothing that the process had is the process' any more whose context has its number next.
#[test]
fn key_of_a_context_that_has_ended_reaches_nobody_else() {
    let bench = Bench::new(AgentOptions { last_ctx_id: 2, ..AgentOptions::default() });
    let (old, _) = bench.context();
    let own = bench.create(old, 0x10_0000, 1).unwrap();
    bench.agent.destroy_context(old);
    eventually("ended", || bench.agent.status().contexts.is_empty());
    let (other, sink) = bench.context();
    let (victim, _) = bench.context();
    assert_eq!((other.ctx_id(), victim.ctx_id()), (2, old.ctx_id()));
    let third = bench.agent.create_context(Owner::default(), sink);
    assert!(matches!(third, Err(Error::TooMany { limit: 2, .. })), "all numbers are taken");
    let id = bench.create(victim, 0x10_0000, 4).unwrap();
    let brought = MemoryFile::new(file(4096), 0, 4096).unwrap();
    let agent = &bench.agent;
    assert_eq!(bench.create(old, 0x20_0000, 1), Err(-32));
    assert!(matches!(agent.import_arena(old, 0x20_0000, &brought), Err(Error::NoContext(1))));
    let pinned = agent.pin_arena(old, 0x20_0000, 4096, || panic!("looked at"));
    assert!(matches!(pinned, Err(Error::NoContext(1))));
    for arena in [id, own] {
        assert!(matches!(agent.cut_arena(old, arena, 0, 4096), Err(Error::NoContext(1))));
        assert!(matches!(agent.free_arena(old, arena), Err(Error::NoContext(1))));
    }
    assert!(matches!(agent.submit(old, &[0; 16], 0), Err(Error::NoContext(1))));
    agent.destroy_context(old);
    assert!(bench.mock.look().submissions.is_empty());
    assert!(agent.status().contexts.iter().all(|context| context.state == "alive"));
    assert_eq!(bench.pages_at(victim, 0x10_0000).unwrap().len(), 1);
}

/// Where a part was cut away, other memory may stand by now, and a device without faults must go on with it.
#[test]
fn arena_with_holes_goes_without_what_stands_in_them() {
    let bench = Bench::new(AgentOptions::default());
    let (key, _) = bench.context();
    let old = bench.create(key, 0x10_0000, 8).unwrap();
    for page in [2, 3, 6] {
        bench.agent.cut_arena(key, old, page * 4096, 4096).unwrap();
    }
    let new = bench.create(key, 0x10_2000, 2).unwrap();
    bench.mock.script(|script| script.invalidated.clear());
    bench.agent.free_arena(key, old).unwrap();
    let parts = [(0x10_0000, 0x2000), (0x10_4000, 0x2000), (0x10_7000, 0x1000)];
    assert_eq!(bench.mock.look().invalidated, parts.map(|(va, len)| (key.ctx_id(), va, len)));
    assert_eq!(bench.released(), [old]);
    assert!(bench.pages_at(key, 0x10_2000).is_some());
    bench.agent.free_arena(key, new).unwrap();
    bench.create(key, 0x10_0000, 8).unwrap();
}

#[test]
fn device_that_breaks_its_rings_ends_the_agent_but_keeps_the_memory() {
    let bench = Bench::new(AgentOptions::default());
    let (_, sink) = bench.context();
    bench.mock.script(|script| script.break_rings = true);
    eventually("failed", || bench.agent.has_failed());
    eventually("told", || !sink.0.lock().unwrap().is_empty());
    assert_eq!(sink.0.lock().unwrap()[0].kind.get(), EVENT_CONTEXT_LOST);
    assert!(matches!(bench.agent.create_context(Owner::default(), sink), Err(Error::NotOpen)));
    assert!(bench.released().is_empty());
}
