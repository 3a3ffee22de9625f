//! What the model guest's kernel does for a process: page tables, moves of pages, answers to faults.

use crate::machine::{Machine, Ram};
use std::collections::BTreeMap;
use virtio_gpu_svm_model::protocol::control::PageRun;
use virtio_gpu_svm_model::protocol::errno::{EAGAIN, EFAULT, EINVAL, ENOENT};
use virtio_gpu_svm_model::protocol::event::FaultRecord;
use virtio_gpu_svm_model::protocol::{LEAF_SIZE, PAGE_SIZE};
use virtio_gpu_svm_model::seeded::{self, Bug};

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
    /// The same of a whole leaf, which is one run.
    pub fn supply_leaf(&self, ctx_id: u32, va: u64) {
        let run = self.mm.lock().unwrap().run(ctx_id, va).unwrap();
        let pages = u32::try_from(LEAF_SIZE / PAGE_SIZE).unwrap();
        self.supply(ctx_id, PageRun { pages: pages.into(), ..run });
    }
    /// The page of memory behind an address.
    pub fn page_of(&self, ctx_id: u32, va: u64) -> u64 {
        self.mm.lock().unwrap().pages[&(ctx_id, va / PAGE_SIZE)]
    }
    /// Other pages take the place of these, which are let go when no engine can use them.
    pub fn move_pages(&self, ctx_id: u32, va: u64, pages: u64) {
        let first = self.ram.take(ctx_id, pages);
        let (old, seq) = {
            // Nobody looks pages up between the change of the table and the invalidation, as in a kernel's notifier.
            let mut mm = self.mm.lock().unwrap();
            let old: Vec<_> =
                (0..pages).filter_map(|n| mm.pages.insert((ctx_id, va / PAGE_SIZE + n), first + n)).collect();
            let seq = self.invalidate(ctx_id, va, pages);
            mm.held.insert(ctx_id, seq);
            (old, seq)
        };
        if !seeded::on(Bug::DropPin) {
            self.wait_done(ctx_id, seq);
        }
        old.into_iter().for_each(|page| self.ram.free(page));
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

    /// Answers a fault, again as long as the answer has raced with an invalidation or with its memory's end.
    pub fn answer(&self, fault: &FaultRecord) {
        let ctx_id = fault.ctx_id.get();
        loop {
            let run = self.mm.lock().unwrap().run(ctx_id, fault.cpu_addr.get());
            let Some(run) = run else {
                assert!(self.faults_vanish, "violation: a fault at a page that the process does not have");
                return;
            };
            match self.respond(ctx_id, fault.vm_id.get(), fault.cookie.get(), run) {
                0 => return,
                status if status == -EAGAIN || status == -EFAULT => {}
                status if self.faults_vanish && (status == -EINVAL || status == -ENOENT) => return,
                status => panic!("violation: the answer to a fault was refused with {status}"),
            }
        }
    }
    /// What a job has stored, or fails if somebody else has.
    pub fn result(&self, ctx_id: u32, va: u64) -> u64 {
        let found = self.ram.get(self.page_of(ctx_id, va), va % PAGE_SIZE / 8);
        assert_eq!(found >> 32, u64::from(ctx_id), "violation: a result of another's: {found:#x}");
        found
    }
}
