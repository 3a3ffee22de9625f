//! What the guest has told of its processes' pages, kept apart from the core: which guest-physical pages a device may
//! use for a CPU address. A page counts from its SUPPLY or answer to the next invalidation that names it, and only if it
//! was translated after the last one (`as_of`); whether the core accepted it does not matter here.

use std::collections::{BTreeMap, HashMap, HashSet};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::gpu::*;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// Runs of more pages are not followed.
const MOST_PAGES: u32 = 2048;

#[derive(Default)]
struct Process {
    /// (CPU page) -> guest-physical pages, and whether the GPU may write.
    pages: BTreeMap<u64, Vec<(u64, bool)>>,
    /// CPU pages `[start, end)` that an invalidation named, and its sequence.
    invalidated: Vec<(u64, u64, u64)>,
}

/// All contexts of a guest.
#[derive(Default)]
pub(crate) struct Shadow {
    processes: HashMap<u32, Process>,
    /// Contexts of which it lost track.
    lost: HashSet<u32>,
    incarnation: u64,
}

impl Shadow {
    /// Before a command is carried out: it may say where pages are.
    pub(crate) fn before(&mut self, request: &[u8]) {
        let Ok((hdr, _)) = CtrlHdr::read_from_prefix(request) else { return };
        match hdr.kind.get() {
            VIRTIO_GPU_CMD_SVM_SUPPLY => {
                self.supplied::<Supply>(request, hdr.ctx_id.get(), |head| head.flags.get())
            }
            VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE => {
                self.supplied::<PageResponse>(request, hdr.ctx_id.get(), |head| head.flags.get())
            }
            _ => {}
        }
    }
    fn supplied<T: FromBytes + Immutable + KnownLayout>(
        &mut self,
        request: &[u8],
        ctx_id: u32,
        flags: impl Fn(&T) -> u16,
    ) {
        let Ok((head, mut rest)) = T::read_from_prefix(request) else { return };
        if flags(&head) & SUPPLY_LIST == 0 {
            while let Ok((run, after)) = PageRun::read_from_prefix(rest) {
                rest = after;
                self.told(ctx_id, &run);
            }
            return;
        }
        let Ok((list, entries)) = PageList::read_from_prefix(rest) else { return };
        for (n, entry) in (0..).zip(entries.chunks_exact(8)) {
            let entry = entry.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
            self.told(
                ctx_id,
                &PageRun {
                    va: list.va.get().wrapping_add(n * 4096).into(),
                    gpa: (entry & !4095).into(),
                    pages: 1.into(),
                    flags: u32::from(entry & 1 != 0).into(),
                    as_of: list.as_of,
                },
            );
        }
    }
    fn told(&mut self, ctx_id: u32, run: &PageRun) {
        if run.pages.get() > MOST_PAGES {
            self.lost.insert(ctx_id);
            return;
        }
        let process = self.processes.entry(ctx_id).or_default();
        let (va, gpa) = (run.va.get() / 4096, run.gpa.get() / 4096);
        for n in 0..u64::from(run.pages.get()) {
            let newer = |(start, end, seq): &(u64, u64, u64)| {
                (*start..*end).contains(&(va + n)) && *seq > run.as_of.get()
            };
            if !process.invalidated.iter().any(newer) {
                let page = (gpa + n, run.flags.get() & RUN_READONLY == 0);
                process.pages.entry(va + n).or_default().push(page);
            }
        }
    }
    /// After a command was carried out: it may have withdrawn pages.
    pub(crate) fn after(&mut self, request: &[u8], answer: &[u8]) {
        let Ok((hdr, _)) = CtrlHdr::read_from_prefix(request) else { return };
        let Ok((head, _)) = SvmResp::read_from_prefix(answer) else { return };
        if head.hdr.kind.get() != VIRTIO_GPU_RESP_OK_NODATA || head.status.get() != 0 {
            return;
        }
        let ctx_id = hdr.ctx_id.get();
        match hdr.kind.get() {
            VIRTIO_GPU_CMD_CTX_CREATE | VIRTIO_GPU_CMD_CTX_DESTROY => self.forget(ctx_id),
            VIRTIO_GPU_CMD_SVM_HELLO => {
                let Ok((hello, _)) = Hello::read_from_prefix(request) else { return };
                if self.incarnation != hello.incarnation.get() {
                    *self = Self { incarnation: hello.incarnation.get(), ..Self::default() };
                }
            }
            VIRTIO_GPU_CMD_SVM_INVALIDATE => {
                let Ok((cmd, _)) = Invalidate::read_from_prefix(request) else { return };
                let Ok((resp, _)) = InvalidateResp::read_from_prefix(answer) else { return };
                let first = cmd.start.get() / 4096;
                let release = cmd.event.get() == INVAL_RELEASE;
                let end = if release { u64::MAX } else { first + cmd.length.get() / 4096 };
                let process = self.processes.entry(ctx_id).or_default();
                process.pages.retain(|page, _| !(first..end).contains(page));
                process.invalidated.push((first, end, resp.seq.get()));
            }
            _ => {}
        }
    }
    /// The guest began anew.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }
    fn forget(&mut self, ctx_id: u32) {
        self.processes.remove(&ctx_id);
        self.lost.remove(&ctx_id);
    }
    /// Whether a device may use a guest-physical page for a CPU page.
    pub(crate) fn allows(&self, ctx_id: u32, page: u64, gpa_page: u64, write: bool) -> bool {
        let pages = self.processes.get(&ctx_id).and_then(|process| process.pages.get(&page));
        let told = pages.is_some_and(|all| all.iter().any(|(gpa, may)| *gpa == gpa_page && (*may || !write)));
        told || self.lost.contains(&ctx_id)
    }
}
