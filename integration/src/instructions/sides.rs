//! The parts of a fault's way by themselves: C -> A, A -> page, asid -> owner, and the device's page table.

use std::sync::Arc;

use anyhow::{Result, ensure};
use virtio_gpu_svm::addr::PageRange;
use virtio_gpu_svm::address_space::{AddressSpace, Install, LEAF_PAGES, Page, Run};
use virtio_gpu_svm::device::Asid;
use virtio_gpu_svm::fault::router::{Owner, Router};
use virtio_gpu_svm::gpu_vm::{Backing, Behind, Change, GpuVa, Mappings};
use virtio_gpu_svm::page_table::{BLOCK_PAGES, PageTable, Run as HostRun};

use super::scene::Scene;
use super::workload::{Operation, scrambled};

/// A page number of a guest process: A of the first page.
const FIRST: u64 = 0x7_f000_0000;
/// How far C is below A, in pages.
const OFFSET: u64 = 0x1_2345_0000;
/// Pages of a mapping, and of the gap behind it.
const MAPPED: u64 = 16;

/// Finds the mapping of a GPU page, and the CPU page behind it.
pub struct Find {
    mappings: Mappings,
    count: u64,
}

impl Find {
    /// Among `count` mappings, a power of two, made in no order.
    pub fn boxed(count: u64) -> Result<Box<dyn Operation>> {
        let mut mappings = Mappings::default();
        for index in (0..count).map(|n| scrambled(n, count)) {
            let cpu = FIRST + index * 2 * MAPPED;
            let range = PageRange { start: cpu - OFFSET, end: cpu - OFFSET + MAPPED };
            let va = GpuVa { range, backing: Backing::Userptr(cpu), readonly: false };
            mappings.map(va, &mut Change::default());
        }
        Ok(Box::new(Self { mappings, count }))
    }
}

impl Operation for Find {
    fn run(&mut self, n: u64) -> bool {
        let cpu = FIRST + scrambled(n, self.count) * 2 * MAPPED + n % MAPPED;
        let found = self.mappings.find(cpu - OFFSET).map(|va| va.behind(cpu - OFFSET));
        matches!(found, Some(Behind::Cpu(page)) if page == cpu)
    }
}

/// Looks up what a CPU page is.
pub struct Lookup {
    space: AddressSpace,
    leaves: u64,
}

impl Lookup {
    /// In `leaves` leaves, a power of two, the first half of each known, page by page.
    pub fn boxed(leaves: u64) -> Result<Box<dyn Operation>> {
        let mut space = AddressSpace::default();
        for leaf in 0..leaves {
            let start = FIRST + leaf * LEAF_PAGES;
            let va = PageRange { start, end: start + LEAF_PAGES / 2 };
            let run = Run { va, first: Page { gpa_page: start, readonly: false }, as_of: 0 };
            ensure!(space.install(&run) == Install::Done, "leaf {leaf} is not taken");
        }
        Ok(Box::new(Self { space, leaves }))
    }
}

impl Operation for Lookup {
    fn run(&mut self, n: u64) -> bool {
        let page = FIRST + scrambled(n, self.leaves) * LEAF_PAGES + n % (LEAF_PAGES / 2);
        self.space.lookup(page).is_some_and(|known| known.gpa_page == page)
    }
}

/// Finds whose an asid is.
pub struct Route {
    router: Router,
    owners: u64,
}

impl Route {
    /// Among so many, a power of two.
    pub fn boxed(owners: u64) -> Result<Box<dyn Operation>> {
        let (router, context) = (Router::default(), Scene::new(1)?.context()?);
        for _ in 0..owners {
            let owner = Owner { context: Arc::clone(&context), vm_id: 1 };
            ensure!(router.take_asid(owner).is_some(), "no asid is left");
        }
        Ok(Box::new(Self { router, owners }))
    }
}

impl Operation for Route {
    fn run(&mut self, n: u64) -> bool {
        let asid = u32::try_from(scrambled(n, self.owners) + 1).unwrap_or(0);
        self.router.route(Asid(asid)).is_some_and(|owner| owner.vm_id == 1)
    }
}

/// Binds a run in the soft device's page table, each behind the one before; tables are made as they are needed.
pub struct Bind {
    table: PageTable,
    run: HostRun,
    first: u64,
}

impl Bind {
    /// Runs of so many pages, from so far within a block on.
    pub fn boxed(pages: u64, within: u64) -> Result<Box<dyn Operation>> {
        let run = HostRun { host: FIRST << 12, pages, writable: true };
        let first = FIRST / BLOCK_PAGES * BLOCK_PAGES + within;
        Ok(Box::new(Self { table: PageTable::new(48, 1 << 30), run, first }))
    }
}

impl Operation for Bind {
    fn run(&mut self, n: u64) -> bool {
        let page = self.first + n * self.run.pages;
        let mut edit = self.table.edit();
        let prepared = edit.prepare(page, self.run.pages).is_ok();
        edit.commit(page, [self.run]);
        prepared
    }

    fn is_done(&self, count: u64) -> bool {
        self.table.resident_pages() == count * self.run.pages
    }
}
