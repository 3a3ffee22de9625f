//! Whole commands, as they come off the control queue: one that changes nothing, and those about very many pages,
//! mappings or blobs. Built before anything is counted.

use anyhow::Result;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::*;
use zerocopy::IntoBytes;

use crate::library::GPA;
use crate::wire;

use super::scene::{A, C, CTX, Scene, WINDOW};
use super::workload::{MAPPINGS, Operation, WINDOWS, scrambled};

/// Pages of a command about very many of them, unless one run has more.
pub const PAGES: u64 = 4096;
/// Pages of a run that is as long as a GiB.
pub const GIB_PAGES: u64 = 1 << 18;
/// Most pages that one VM_BIND may make resident.
const BIND_PAGES: u64 = 1 << 16;
/// Guest memory in pages; a power of two.
const MEMORY_PAGES: u64 = GIB_PAGES;

/// Asks after a GPU VM: the request that changes nothing.
pub fn nothing() -> Vec<u8> {
    wire::property(CTX, 1)
}

/// Whether a scene is as so many operations leave it.
type IsDone = dyn Fn(&Scene, u64) -> bool;

/// Commands of which each operation takes the next so many, and what must be there in the end.
pub struct Script {
    scene: Scene,
    commands: Vec<Vec<u8>>,
    each: u64,
    is_done: Box<IsDone>,
}

impl Script {
    /// One request that changes nothing, again and again.
    pub fn nothing() -> Result<Box<dyn Operation>> {
        let (scene, commands) = (Scene::new(MAPPINGS)?, vec![nothing()]);
        Ok(Box::new(Self { scene, commands, each: 0, is_done: Box::new(|_, _| true) }))
    }

    /// SUPPLY of so many pages, in runs of so many that lie at random in guest memory, and the VM_BINDs that map them and
    /// make them resident. For so many operations.
    pub fn bind(pages: u64, run: u64, operations: u64) -> Result<Box<dyn Operation>> {
        Self::bind_told(pages, operations, |first| wire::supply(CTX, &runs(first, pages, run)))
    }

    /// The same in runs of one page, told as a list.
    pub fn bind_list(pages: u64, operations: u64) -> Result<Box<dyn Operation>> {
        Self::bind_told(pages, operations, |first| wire::supply_list(CTX, &runs(first, pages, 1)))
    }

    fn bind_told(pages: u64, operations: u64, tell: impl Fn(u64) -> Vec<u8>) -> Result<Box<dyn Operation>> {
        let scene = Scene::bare(MEMORY_PAGES * PAGE_SIZE)?;
        let mut commands = Vec::new();
        for first in (0..operations).map(|n| n * pages) {
            commands.push(tell(first));
            for part in (0..pages).step_by(usize::try_from(BIND_PAGES)?) {
                commands.push(map(first + part, BIND_PAGES.min(pages - part), BIND_IMMEDIATE));
            }
        }
        let is_done = Box::new(move |scene: &Scene, count| scene.resident_pages() == count * pages);
        Ok(Box::new(Self { scene, each: 1 + pages.div_ceil(BIND_PAGES), commands, is_done }))
    }

    /// INVALIDATE of so many pages, all resident one by one, in one mapping.
    pub fn invalidate_pages(operations: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::bare(MEMORY_PAGES * PAGE_SIZE)?;
        let mut commands = Vec::new();
        for first in (0..operations).map(|n| n * PAGES) {
            let prepared = [wire::supply(CTX, &runs(first, PAGES, 1)), map(first, PAGES, BIND_IMMEDIATE)];
            anyhow::ensure!(prepared.iter().all(|command| scene.control(command)), "a bind was refused");
            commands.push(invalidate(first, PAGES));
        }
        let is_done =
            Box::new(move |scene: &Scene, count| scene.resident_pages() == (operations - count) * PAGES);
        Ok(Box::new(Self { scene, commands, each: 1, is_done }))
    }

    /// INVALIDATE of pages that so many mappings show, among as many as there are windows. All are resident.
    pub fn invalidate_mappings(mappings: u64, operations: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::new(WINDOWS)?;
        scene.supply(WINDOW)?;
        (0..WINDOWS).for_each(|window| scene.raise(window));
        let pages = mappings * WINDOW;
        let commands = (0..operations).map(|n| invalidate(n * pages, pages)).collect();
        let is_done =
            Box::new(move |scene: &Scene, count| scene.resident_pages() == WINDOWS * WINDOW - count * pages);
        Ok(Box::new(Self { scene, commands, each: 1, is_done }))
    }

    /// RESOURCE_UNREF of a blob that one mapping shows, among as many mappings of memory as there are windows.
    pub fn unref(operations: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::new(WINDOWS)?;
        let place = C + WINDOWS * WINDOW * PAGE_SIZE;
        let named = |kind, n| CtxResource { hdr: wire::header(kind, CTX), resource_id: n, padding: 0.into() };
        let mut commands = Vec::new();
        for n in 0..operations {
            let id = u32::try_from(n + 1)?.into();
            let blob = ResourceCreateBlob {
                hdr: wire::header(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
                resource_id: id,
                blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
                nr_entries: 1.into(),
                size: PAGE_SIZE.into(),
                ..ResourceCreateBlob::default()
            };
            let entry =
                MemEntry { addr: GPA.into(), length: u32::try_from(PAGE_SIZE)?.into(), padding: 0.into() };
            let bind = BindOp {
                op: BIND_OP_MAP.into(),
                resource_id: id,
                addr: (place + n * PAGE_SIZE).into(),
                range: PAGE_SIZE.into(),
                ..BindOp::default()
            };
            let prepared = [
                [blob.as_bytes(), entry.as_bytes()].concat(),
                named(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, id).as_bytes().to_vec(),
                wire::bind(CTX, 1, &[bind]),
            ];
            anyhow::ensure!(prepared.iter().all(|command| scene.control(command)), "blob {n} was refused");
            let unref = CtxResource { hdr: wire::header(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0), ..named(0, id) };
            commands.push(unref.as_bytes().to_vec());
        }
        let is_done = Box::new(move |scene: &Scene, count| scene.resources() as u64 == operations - count);
        Ok(Box::new(Self { scene, commands, each: 1, is_done }))
    }
}

impl Operation for Script {
    fn run(&mut self, n: u64) -> bool {
        let first = usize::try_from(n * self.each).unwrap_or(usize::MAX);
        let count = usize::try_from(self.each.max(1)).unwrap_or(usize::MAX);
        let mut commands = self.commands.iter().skip(first).take(count);
        commands.all(|command| self.scene.control(command))
    }

    fn is_done(&self, count: u64) -> bool {
        (self.is_done)(&self.scene, count)
    }
}

/// Pages from the `first` of A on, in runs.
fn runs(first: u64, pages: u64, run: u64) -> Vec<PageRun> {
    let of = |n: u64| PageRun {
        va: (A + (first + n * run) * PAGE_SIZE).into(),
        gpa: (GPA + scrambled(n, MEMORY_PAGES / run) * run * PAGE_SIZE).into(),
        pages: u32::try_from(run).unwrap_or(0).into(),
        flags: 0.into(),
        as_of: 0.into(),
    };
    (0..pages / run).map(of).collect()
}

/// Maps pages of A, at the same place of C.
fn map(first: u64, pages: u64, flags: u32) -> Vec<u8> {
    let operation = BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        flags: flags.into(),
        addr: (C + first * PAGE_SIZE).into(),
        range: (pages * PAGE_SIZE).into(),
        obj_offset: (A + first * PAGE_SIZE).into(),
        ..BindOp::default()
    };
    wire::bind(CTX, 1, &[operation])
}

fn invalidate(first: u64, pages: u64) -> Vec<u8> {
    wire::invalidate(CTX, A + first * PAGE_SIZE, pages * PAGE_SIZE)
}
