//! What the model guest's kernel does for a process: page tables, moves of pages, answers to faults.

use crate::machine::{Machine, Ram};
use std::collections::BTreeMap;
use virtio_gpu_svm_model::protocol::PAGE_SIZE;
use virtio_gpu_svm_model::protocol::control::PageRun;
use virtio_gpu_svm_model::protocol::errno::{EAGAIN, EFAULT, EINVAL, ENOENT};
use virtio_gpu_svm_model::protocol::event::FaultRecord;
use virtio_gpu_svm_model::seeded::{self, Bug};
use virtio_gpu_svm_model::shuttle::rand::{Rng, thread_rng};

/// A: a leaf of the process with an even number.
pub const A: u64 = 0x7f00_0000_0000;
/// C: a large leaf fits here.
pub const C: u64 = 0x20_0000;

/// Page tables of all processes.
#[derive(Default)]
pub struct Mm {
    /// (context, page of the process) -> page of memory
    pages: BTreeMap<(u32, u64), u64>,
    /// The last invalidation of each context that was accepted.
    held: BTreeMap<u32, u64>,
}

impl Mm {
    fn run(&self, ctx_id: u32, va: u64) -> Option<PageRun> {
        let page = self.pages.get(&(ctx_id, va / PAGE_SIZE))?;
        let as_of = self.held.get(&ctx_id).copied().unwrap_or(0);
        let (va, gpa) = (va.into(), Ram::gpa(*page).into());
        Some(PageRun { va, gpa, pages: 1.into(), flags: 0.into(), as_of: as_of.into() })
    }
    /// Those of the pages that are there; none without the first.
    fn runs(&self, ctx_id: u32, va: u64, pages: u64) -> Vec<PageRun> {
        let first = self.run(ctx_id, va);
        let others = (1..pages).filter_map(|n| self.run(ctx_id, va + n * PAGE_SIZE));
        first.map_or_else(Vec::new, |first| std::iter::once(first).chain(others).collect())
    }
}

/// Pages that are let go when their invalidation is done.
pub struct Moved {
    old: Vec<u64>,
    seq: u64,
}

/// What the guest has been told of a fault.
pub struct Asked {
    pub fault: FaultRecord,
    /// Pages that it may answer with.
    pub pages: u64,
    /// Whether there is no record to come.
    pub whole: bool,
}

impl Machine {
    /// A context with a GPU VM on each of these devices that shows `pages` of [`A`] at [`C`]; returns their ids.
    pub fn process(&self, ctx_id: u32, pages: u64, devices: u32) -> Vec<u32> {
        self.ctx_create(ctx_id);
        self.note_context(ctx_id);
        let vms: Vec<u32> = (0..devices).map(|dev_id| self.vm_create(ctx_id, dev_id)).collect();
        vms.iter().for_each(|vm| self.bind(ctx_id, *vm, crate::wire::map(C, A, pages)));
        vms
    }
    /// The process gets pages of its own from an address on; the first of them.
    pub fn populate(&self, ctx_id: u32, va: u64, pages: u64) -> u64 {
        let first = self.ram.take(ctx_id, pages);
        let mut mm = self.mm.lock().unwrap();
        mm.pages.extend((0..pages).map(|n| ((ctx_id, va / PAGE_SIZE + n), first + n)));
        first
    }
    /// Tells the device of one page unasked.
    pub fn supply_page(&self, ctx_id: u32, va: u64) {
        let run = self.mm.lock().unwrap().run(ctx_id, va);
        self.supply(ctx_id, run.unwrap());
    }
    /// The same of pages that lie side by side in memory.
    pub fn supply_run(&self, ctx_id: u32, va: u64, pages: u64) {
        let run = self.mm.lock().unwrap().run(ctx_id, va).unwrap();
        self.supply(ctx_id, PageRun { pages: u32::try_from(pages).unwrap().into(), ..run });
    }
    /// The page of memory behind an address.
    pub fn page_of(&self, ctx_id: u32, va: u64) -> u64 {
        self.mm.lock().unwrap().pages[&(ctx_id, va / PAGE_SIZE)]
    }
    /// Other pages take the place of these, which are let go when no engine can use them.
    pub fn move_pages(&self, ctx_id: u32, va: u64, pages: u64) {
        let moved = self.begin_move(ctx_id, va, pages);
        self.end_move(ctx_id, moved);
    }
    /// The invalidation is accepted.
    pub fn begin_move(&self, ctx_id: u32, va: u64, pages: u64) -> Moved {
        let first = self.ram.take(ctx_id, pages);
        self.change(ctx_id, va, pages, |mm, at, n| mm.pages.insert(at, first + n))
    }
    /// It is done.
    pub fn end_move(&self, ctx_id: u32, moved: Moved) {
        if !seeded::on(Bug::DropPin) {
            self.wait_done(ctx_id, moved.seq);
        }
        moved.old.into_iter().for_each(|page| self.ram.free(page));
    }
    /// The process has a page no more.
    pub fn drop_page(&self, ctx_id: u32, va: u64) {
        let moved = self.change(ctx_id, va, 1, |mm, at, _| mm.pages.remove(&at));
        self.end_move(ctx_id, moved);
    }
    /// Nobody looks pages up between the change of the table and the invalidation, as in a kernel's notifier.
    fn change(
        &self,
        ctx_id: u32,
        va: u64,
        pages: u64,
        change: impl Fn(&mut Mm, (u32, u64), u64) -> Option<u64>,
    ) -> Moved {
        let mut mm = self.mm.lock().unwrap();
        let old = (0..pages).filter_map(|n| change(&mut mm, (ctx_id, va / PAGE_SIZE + n), n)).collect();
        let seq = self.invalidate(ctx_id, va, pages);
        mm.held.insert(ctx_id, seq);
        Moved { old, seq }
    }
    /// The page comes from the region that can be taken away.
    pub fn populate_more(&self, ctx_id: u32, va: u64) {
        let page = self.ram.take_more(ctx_id);
        self.mm.lock().unwrap().pages.insert((ctx_id, va / PAGE_SIZE), page);
    }
    /// That region goes; another page takes the place of the one.
    pub fn unplug_under(&self, ctx_id: u32, va: u64) {
        let new = self.ram.take(ctx_id, 1);
        let old = {
            let mut mm = self.mm.lock().unwrap();
            let old = mm.pages.insert((ctx_id, va / PAGE_SIZE), new);
            self.unplug();
            old
        };
        self.ram.free(old.unwrap());
    }
    /// The process is gone, and with it all of its pages.
    pub fn free_all(&self, ctx_id: u32) {
        let mut mm = self.mm.lock().unwrap();
        mm.pages.retain(|(owner, _), page| {
            if *owner == ctx_id {
                self.ram.free(*page);
            }
            *owner != ctx_id
        });
    }

    /// Answers a fault, at times in part, and again as long as the answer has raced with an invalidation or with its
    /// memory's end.
    pub fn answer(&self, asked: &Asked) {
        let fault = &asked.fault;
        let (ctx_id, vm_id, cookie) = (fault.ctx_id.get(), fault.vm_id.get(), fault.cookie.get());
        loop {
            let pages = if asked.pages > 1 { thread_rng().gen_range(1..=asked.pages) } else { 1 };
            let runs = self.mm.lock().unwrap().runs(ctx_id, fault.cpu_addr.get(), pages);
            if runs.is_empty() && !self.needs.holes {
                let vanishes = self.needs.faults_vanish;
                assert!(vanishes, "violation: a fault at a page that the process does not have");
                return;
            }
            match self.respond(ctx_id, vm_id, cookie, &runs) {
                0 => return,
                status if status == -EAGAIN || status == -EFAULT => {}
                status if self.needs.faults_vanish && (status == -EINVAL || status == -ENOENT) => return,
                status => panic!("violation: the answer to a fault was refused with {status}"),
            }
        }
    }
    /// Answers a group of which not all was told.
    pub fn answer_early(&self, asked: &Asked) {
        let (ctx_id, vm_id, va) =
            (asked.fault.ctx_id.get(), asked.fault.vm_id.get(), asked.fault.cpu_addr.get());
        let runs = self.mm.lock().unwrap().runs(ctx_id, va, 1);
        let status = self.respond(ctx_id, vm_id, asked.fault.cookie.get(), &runs);
        let closed = self.queue.lock().unwrap().closed;
        assert!(
            closed || status == -EINVAL,
            "violation: an answer before the last record of a group was not stale"
        );
    }
    /// What a job has stored, or fails if somebody else has.
    pub fn result(&self, ctx_id: u32, va: u64) -> u64 {
        let found = self.ram.get(self.page_of(ctx_id, va), va % PAGE_SIZE / 8);
        assert_eq!(found >> 32, u64::from(ctx_id), "violation: a result of another's: {found:#x}");
        found
    }
}
