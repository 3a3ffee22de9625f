//! The software GPU's page table: a radix tree from GPU page to host address, one atomic word per page.
//!
//! Engines look up with [`Walk`] through a shared reference and without a lock, while the core binds and zaps through
//! [`Edit`], one at a time. A word is either absent or a whole translation, so a reader sees the old or the new one;
//! that nobody still *uses* an old one is the flush's business, not the table's.
//!
//! Tables that became empty are only noted; [`PageTable::reclaim`] frees them and takes `&mut self`, so that the
//! borrow checker proves what an epoch scheme would promise: no reader is inside. Freeing only with the VM would be
//! simpler, but a guest that binds and unbinds across a sparse space would then hold 4 KiB of ours for each page.
//!
//! Three kinds of table, 512 entries each: *directories* of tables, one *block* table per GiB whose `Block` entries
//! are large leaves or lead to small ones, and *leaves*: 8 bytes a page plus 24 per 2 MiB. A large leaf that is cut
//! goes whole: its other pages fault again. `prepare` allocates and may fail; `commit` cannot. A *null* translation has
//! a word like others, with no memory behind it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod cells;
mod spares;

pub use spares::Spares;

use crate::addr::PageRange;
use crate::device::ScatteredPage;
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::quota::{Charge, Full};
use crate::seeded::{self, Bug};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use cells::{clear_entries, entries_of, follow, for_each_unrolled, present_in};
use zerocopy::FromZeros;

/// log2 of the entries of a table.
const FANOUT_BITS: u32 = 9;
/// Entries of a table.
const FANOUT: usize = 1 << FANOUT_BITS;
/// Pages of a block: what one leaf table or one large leaf covers.
pub const BLOCK_PAGES: u64 = 1 << FANOUT_BITS;

/// The word holds a translation.
const PRESENT: u64 = 1 << 0;
/// The GPU may write.
const WRITABLE: u64 = 1 << 1;
/// Block words only: the translation is of the whole block.
const LARGE: u64 = 1 << 2;
/// Block words only: the block is on the list of emptied ones.
const NOTED: u64 = 1 << 3;
/// The translation has no memory: it reads as zero and swallows writes.
const NULL: u64 = 1 << 4;
/// The host address; in a block word that is not large, the number of pages present in the leaf.
const PAYLOAD: u64 = !(PAGE_SIZE - 1);

const LEAF_BYTES: usize = size_of::<[AtomicU64; FANOUT]>();
const BLOCKS_BYTES: usize = size_of::<[Block; FANOUT]>();
const DIRECTORY_BYTES: usize = size_of::<[OnceLock<Node>; FANOUT]>();

/// Why a table was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTable {
    /// No memory for it, or the bound of this page table is reached.
    #[error("no memory for page tables")]
    OutOfMemory,
    /// The guest's tables take as many bytes as they may.
    #[error(transparent)]
    OverQuota(#[from] Full),
}

/// Pages that follow each other both in the GPU's space and in the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Host address of the first; page aligned.
    pub host: u64,
    /// How many, at least 1.
    pub pages: u64,
    /// Whether the GPU may write.
    pub writable: bool,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Host address of the page; 0 if it is null.
    pub host: u64,
    /// Pages from this one on that surely follow in the host's space too, or are null too; at least 1.
    pub pages: u64,
    /// Whether the GPU may write.
    pub writable: bool,
    /// Whether there is no memory behind it.
    pub null: bool,
    /// Level of the word; 0 for a page, 1 for a large leaf.
    pub level: u8,
}

/// A lookup that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Level of the table at which the walk ended; 0 is the last.
    pub level: u8,
}

type Leaf = [AtomicU64; FANOUT];

/// An entry of a block table.
#[derive(Default)]
struct Block {
    /// A large leaf, or the count of pages present in `leaf`.
    word: AtomicU64,
    leaf: OnceLock<Box<Leaf>>,
}

/// A table above the leaves.
enum Node {
    Directory(Box<[OnceLock<Node>; FANOUT]>),
    Blocks(Box<[Block; FANOUT]>),
}

/// What editors share and readers do not need.
struct Books {
    /// Of all tables.
    charge: Charge,
    /// Blocks that may have tables without any page: first pages of blocks, in units of blocks.
    emptied: Vec<u64>,
}

/// A page table. See the module's text.
pub struct PageTable {
    /// Level of the root; leaves are 0, block tables 1.
    top: u32,
    end: u64,
    max_table_bytes: usize,
    root: OnceLock<Node>,
    resident: AtomicU64,
    emptied: AtomicUsize,
    books: Mutex<Books>,
    spares: Arc<Spares>,
}

impl PageTable {
    /// An empty table for addresses below `1 << va_bits` (22 to 57), whose tables never take more bytes than this, and are
    /// charged to nobody.
    pub fn new(va_bits: u32, max_table_bytes: usize) -> Self {
        Self::charged(va_bits, max_table_bytes, Charge::default(), Arc::default())
    }

    /// The same, charged for, and with tables from and for others.
    pub fn charged(va_bits: u32, max_table_bytes: usize, charge: Charge, spares: Arc<Spares>) -> Self {
        assert!((22..=57).contains(&va_bits), "a GPU VM of {va_bits} address bits");
        let page_bits = va_bits.saturating_sub(PAGE_SHIFT);
        Self {
            top: page_bits.div_ceil(FANOUT_BITS).saturating_sub(1),
            end: 1u64.wrapping_shl(page_bits),
            max_table_bytes,
            root: OnceLock::new(),
            resident: AtomicU64::new(0),
            emptied: AtomicUsize::new(0),
            books: Mutex::new(Books { charge, emptied: Vec::new() }),
            spares,
        }
    }

    /// First page number beyond the space.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Pages with a translation now.
    pub fn resident_pages(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Blocks noted as empty, whose tables [`PageTable::reclaim`] would free.
    pub fn emptied_blocks(&self) -> usize {
        self.emptied.load(Ordering::Relaxed)
    }

    /// Bytes of all tables.
    pub fn table_bytes(&self) -> u64 {
        self.books().charge.amount()
    }

    /// Begins to look up.
    pub fn walk(&self) -> Walk<'_> {
        Walk { table: self, hot: None }
    }

    /// Begins to change; other editors wait, readers do not.
    pub fn edit(&self) -> Edit<'_> {
        Edit { table: self, books: self.books(), hot: None, noted: None, prepared: None }
    }

    /// Frees tables without pages: those of at most `most` blocks.
    pub fn reclaim(&mut self, most: usize) {
        let books = self.books.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut emptied = books.emptied.split_off(books.emptied.len().saturating_sub(most));
        emptied.sort_unstable();
        emptied.dedup();
        let freed = prune(&mut self.root, self.top, &emptied, &self.spares);
        books.charge.shrink(u64::try_from(freed).unwrap_or(u64::MAX));
        *self.emptied.get_mut() = books.emptied.len();
    }

    /// Frees at most `most` tables, and all at last, whatever is in them. Returns whether there are more.
    pub fn dismantle(&mut self, most: usize) -> bool {
        let mut left = most;
        demolish(&mut self.root, &mut left);
        self.root.get().is_some()
    }

    /// A panic while editing is a bug, but each word is whole at any time: readers may go on.
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lookup_block(&self, number: u64) -> Result<&Block, Miss> {
        let (mut cell, mut level) = (&self.root, self.top);
        // The table in which the walk stands; above the root is nothing, so it counts as the root.
        let mut within = self.top;
        loop {
            match cell.get() {
                Some(Node::Blocks(blocks)) => return Ok(entry(blocks, index(number, 0))),
                Some(Node::Directory(children)) => {
                    within = level;
                    level = level.saturating_sub(1);
                    cell = entry(children, index(number, level));
                }
                None => return Err(miss(within)),
            }
        }
    }
}

/// A reader that remembers the last block, so that a run of lookups walks once per 512 pages. Words are always read
/// anew.
pub struct Walk<'a> {
    table: &'a PageTable,
    hot: Option<(u64, &'a Block)>,
}

impl Walk<'_> {
    /// The translation of a page.
    ///
    /// # Errors
    /// [`Miss`] if it has none.
    #[inline]
    pub fn lookup(&mut self, page: u64) -> Result<Translation, Miss> {
        self.lookup_run(page, 1)
    }

    /// The translation of a page, and of as many behind it as follow in the host's space too and have the same rights: of
    /// small ones at most `most` in all, and as far as its block goes.
    ///
    /// # Errors
    /// [`Miss`] if it has none.
    #[inline]
    pub fn lookup_run(&mut self, page: u64, most: u64) -> Result<Translation, Miss> {
        let number = page >> FANOUT_BITS;
        let block = match self.hot {
            Some((hot, block)) if hot == number => block,
            _ if page >= self.table.end => {
                return Err(miss(self.table.top));
            }
            _ => {
                let block = self.table.lookup_block(number)?;
                self.hot = Some((number, block));
                block
            }
        };
        block.lookup(page, most)
    }
}

impl Block {
    #[inline]
    fn lookup(&self, page: u64, most: u64) -> Result<Translation, Miss> {
        let word = self.word.load(Ordering::Acquire);
        if word & LARGE != 0 {
            let inner = page & (BLOCK_PAGES - 1);
            let (writable, null) = (word & WRITABLE != 0, word & NULL != 0);
            let host = if null { 0 } else { (word & PAYLOAD).saturating_add(inner << PAGE_SHIFT) };
            return Ok(Translation {
                host,
                pages: BLOCK_PAGES.saturating_sub(inner),
                writable,
                null,
                level: 1,
            });
        }
        let leaf = self.leaf.get().ok_or(Miss { level: 1 })?;
        let word = entry(leaf, index(page, 0)).load(Ordering::Acquire);
        if word & PRESENT == 0 {
            return Err(Miss { level: 0 });
        }
        let (writable, null) = (word & WRITABLE != 0, word & NULL != 0);
        let pages = if most > 1 && !null { follow(leaf, page, word, most) } else { 1 };
        Ok(Translation { host: word & PAYLOAD, pages, writable, null, level: 0 })
    }

    /// Whether there is nothing to it: no pages, no leaf. One that is noted will be looked at for the note.
    fn is_empty(&self) -> bool {
        self.word.load(Ordering::Relaxed) == 0 && self.leaf.get().is_none()
    }

    fn is_large(&self) -> bool {
        self.word.load(Ordering::Relaxed) & LARGE != 0
    }

    /// Pages with a translation.
    fn present(&self) -> u64 {
        let word = self.word.load(Ordering::Relaxed);
        if word & LARGE != 0 { BLOCK_PAGES } else { word >> PAGE_SHIFT }
    }

    /// Its pages in the range that have a translation.
    fn resident_in(&self, part: PageRange) -> u64 {
        if self.is_large() {
            return part.pages();
        }
        let Some(leaf) = self.leaf.get().filter(|_| self.present() > 0) else { return 0 };
        if part.pages() == BLOCK_PAGES {
            return self.present();
        }
        present_in(entries_of(leaf, part))
    }

    /// Stores the word, but keeps whether the block is noted as emptied.
    fn set_word(&self, word: u64) {
        let noted = self.word.load(Ordering::Relaxed) & NOTED;
        self.word.store(word | noted, Ordering::Release);
    }
}

/// The right to change a table.
pub struct Edit<'a> {
    table: &'a PageTable,
    books: MutexGuard<'a, Books>,
    /// The block table in use, and its number: of GiBs from the start of the space.
    hot: Option<(u64, &'a [Block; FANOUT])>,
    /// The block table of which a block was noted last.
    noted: Option<u64>,
    /// The block that was prepared last, if it has a leaf.
    prepared: Option<(u64, &'a Block)>,
}

/// A block whose leaf is being filled by rising pages; its word is stored when that ends.
struct Filling<'a> {
    number: u64,
    block: &'a Block,
    leaf: &'a Leaf,
    /// Pages present so far, and how many there were.
    present: u64,
    before: u64,
}

impl Filling<'_> {
    /// Stores the word of one page of the block.
    #[inline]
    fn store_one(&mut self, page: u64, word: u64) {
        let cell = entry(self.leaf, index(page, 0));
        let replaced = if self.before == 0 { 0 } else { cell.load(Ordering::Relaxed) & PRESENT };
        cell.store(word, Ordering::Release);
        self.present = self.present.saturating_add(1).saturating_sub(replaced);
    }
    /// Stores `first`, rising by `step` a page.
    fn store(&mut self, part: PageRange, first: u64, step: u64) {
        let cells = entries_of(self.leaf, part);
        let replaced = self.replaced_in(cells, part);
        let mut word = first;
        for_each_unrolled(cells, |cell| {
            cell.store(word, Ordering::Release);
            word = word.wrapping_add(step);
        });
        self.present = self.present.saturating_add(part.pages()).saturating_sub(replaced);
    }
    /// Stores the words of pages one by one, each added to `base`.
    fn store_scattered(&mut self, part: PageRange, base: u64, pages: &[ScatteredPage]) {
        let cells = entries_of(self.leaf, part);
        let replaced = self.replaced_in(cells, part);
        let store = |cell: &AtomicU64, page: &ScatteredPage| {
            cell.store(base.wrapping_add(page.word()), Ordering::Release);
        };
        let ((cells, last_cells), (pages, last_pages)) = (cells.as_chunks::<8>(), pages.as_chunks::<8>());
        for (cells, pages) in cells.iter().zip(pages) {
            cells.iter().zip(pages).for_each(|(cell, page)| store(cell, page));
        }
        last_cells.iter().zip(last_pages).for_each(|(cell, page)| store(cell, page));
        self.present = self.present.saturating_add(part.pages()).saturating_sub(replaced);
    }
    /// How many of a part's pages there are already.
    fn replaced_in(&self, cells: &[AtomicU64], part: PageRange) -> u64 {
        // Into what was empty, or is full, nothing needs to be looked at before it is stored.
        match self.before {
            0 => 0,
            BLOCK_PAGES => part.pages(),
            _ => present_in(cells),
        }
    }
}

impl<'a> Edit<'a> {
    /// Makes every table that [`Edit::commit`] of a run at `page` needs.
    ///
    /// # Errors
    /// [`NoTable`]; what was made is freed by the next reclaim, unless it is used until then.
    #[inline]
    pub fn prepare(&mut self, page: u64, pages: u64) -> Result<(), NoTable> {
        if pages == 1
            && let Some((number, _)) = self.prepared
            && number == page >> FANOUT_BITS
        {
            return Ok(());
        }
        self.prepare_blocks(page, pages)
    }

    fn prepare_blocks(&mut self, page: u64, pages: u64) -> Result<(), NoTable> {
        // A null run may be as large as the space: what cannot fit even alone is refused before the first table.
        let tables = usize::try_from(pages >> (2 * FANOUT_BITS)).unwrap_or(usize::MAX);
        if tables.saturating_mul(BLOCKS_BYTES) > self.table.max_table_bytes {
            return Err(NoTable::OutOfMemory);
        }
        self.prepare_parts(PageRange { start: page, end: page.saturating_add(pages) }, false)
    }

    /// Makes every table that [`Edit::commit_scattered`] of this range needs.
    ///
    /// # Errors
    /// As of [`Edit::prepare`].
    pub fn prepare_leaves(&mut self, range: PageRange) -> Result<(), NoTable> {
        self.prepare_parts(range, true)
    }

    fn prepare_parts(&mut self, range: PageRange, scattered: bool) -> Result<(), NoTable> {
        for part in blocks_of(range) {
            let made = self.prepare_block(part, scattered);
            if made.is_err() {
                // Directories without a child are found again by this note, and so is the block of an earlier part.
                self.note_number(part.start >> FANOUT_BITS);
                return made;
            }
        }
        Ok(())
    }

    /// Stores runs one behind the other from `page` on, over whatever stands there. Whole aligned blocks of a run become
    /// large leaves. A large leaf that is cut goes whole.
    ///
    /// # Panics
    /// If a run was not prepared under this edit.
    pub fn commit(&mut self, page: u64, runs: impl IntoIterator<Item = Run>) {
        let (mut filling, mut start) = (None::<Filling<'a>>, page);
        for run in runs {
            debug_assert_eq!(run.host & !PAYLOAD, 0, "host address {:#x} of a run", run.host);
            let rights = if run.writable { PRESENT | WRITABLE } else { PRESENT };
            let range = PageRange { start, end: start.saturating_add(run.pages) };
            match &mut filling {
                Some(here) if run.pages == 1 && here.number == start >> FANOUT_BITS => {
                    here.store_one(start, run.host | rights);
                }
                _ => self.commit_words(&mut filling, range, run.host | rights, PAGE_SIZE),
            }
            start = range.end;
        }
        self.end_filling(filling);
    }

    /// Stores translations of pages one behind the other from `page` on, over whatever stands there: at their offsets from
    /// `host`. All are small ones; a large leaf that is cut goes whole.
    ///
    /// # Panics
    /// If the range was not prepared under this edit with [`Edit::prepare_leaves`].
    pub fn commit_scattered(&mut self, page: u64, host: u64, pages: &[ScatteredPage]) {
        debug_assert_eq!(host & !PAYLOAD, 0, "host address {host:#x} of a region");
        let range = PageRange { start: page, end: page.saturating_add(pages.len() as u64) };
        let mut rest = pages;
        for part in blocks_of(range) {
            let number = part.start >> FANOUT_BITS;
            let block = match self.prepared {
                Some((prepared, block)) if prepared == number => block,
                _ => match self.obtain_block(number) {
                    Ok(block) => block,
                    Err(_) => panic!("page {:#x} was not prepared", part.start),
                },
            };
            let mut filling = self.begin_filling(number, block);
            let count = usize::try_from(part.pages()).unwrap_or(0);
            let (these, others) = rest.split_at_checked(count).unwrap_or_default();
            filling.store_scattered(part, host | PRESENT, these);
            rest = others;
            self.end_filling(Some(filling));
        }
    }

    /// Stores null translations, as [`Edit::commit`] does others.
    ///
    /// # Panics
    /// If the range was not prepared under this edit.
    pub fn commit_null(&mut self, range: PageRange) {
        let mut filling = None;
        self.commit_words(&mut filling, range, PRESENT | WRITABLE | NULL, 0);
        self.end_filling(filling);
    }

    /// Forgets what was prepared for a range and not committed.
    pub fn abandon(&mut self, range: PageRange) {
        self.visit(range, |edit, part, block| {
            if block.present() == 0 {
                edit.note(part.start >> FANOUT_BITS, block);
            }
        });
    }

    /// Pages of the range that have a translation.
    pub fn resident_in(&mut self, range: PageRange) -> u64 {
        let mut found = 0_u64;
        self.visit(range, |_, part, block| found = found.saturating_add(block.resident_in(part)));
        found
    }

    /// Drops the translations of a range; a large leaf that is cut goes whole.
    pub fn clear(&mut self, range: PageRange) {
        self.visit(range, |edit, part, block| {
            let half = part.start & (BLOCK_PAGES - 1) >= BLOCK_PAGES / 2;
            if block.is_large() && !(half && seeded::on(Bug::LeaveHalf)) {
                edit.drop_large(part.start >> FANOUT_BITS, block);
            } else if part.pages() == BLOCK_PAGES {
                edit.clear_block(part.start >> FANOUT_BITS, block);
            } else {
                edit.clear_small(part, block, |_| true);
            }
        });
    }

    /// Drops every translation to host addresses in `[start, end)`; runs never straddle either.
    pub fn clear_hosts(&mut self, start: u64, end: u64) {
        let hit = |word: u64| word & NULL == 0 && (start..end).contains(&(word & PAYLOAD));
        self.visit(PageRange { start: 0, end: self.table.end }, |edit, part, block| {
            if !block.is_large() {
                edit.clear_small(part, block, hit);
            } else if hit(block.word.load(Ordering::Relaxed)) {
                edit.drop_large(part.start >> FANOUT_BITS, block);
            }
        });
    }

    /// With a leaf, unless the part is a whole block and one piece.
    fn prepare_block(&mut self, part: PageRange, scattered: bool) -> Result<(), NoTable> {
        let block = self.obtain_block(part.start >> FANOUT_BITS)?;
        if (scattered || part.pages() < BLOCK_PAGES) && block.leaf.get().is_none() {
            // Zeroed as a whole: most leaves are made to be filled at once.
            let spare = || self.table.spares.take_leaf();
            let leaf = self.allocate(LEAF_BYTES, || spare().or_else(|| Leaf::new_box_zeroed().ok()))?;
            block.leaf.get_or_init(|| leaf);
        }
        self.prepared = block.leaf.get().map(|_| (part.start >> FANOUT_BITS, block));
        Ok(())
    }

    fn obtain_block(&mut self, number: u64) -> Result<&'a Block, NoTable> {
        assert!(number < self.table.end >> FANOUT_BITS, "block {number:#x} is beyond the space");
        let blocks = match self.hot {
            Some((hot, blocks)) if hot == number >> FANOUT_BITS => blocks,
            _ => self.obtain_blocks(number)?,
        };
        self.hot = Some((number >> FANOUT_BITS, blocks));
        Ok(entry(blocks, index(number, 0)))
    }

    /// The block table that has this block.
    fn obtain_blocks(&mut self, number: u64) -> Result<&'a [Block; FANOUT], NoTable> {
        let table = self.table;
        let (mut cell, mut level) = (&table.root, table.top);
        loop {
            let node = match cell.get() {
                Some(node) => node,
                None => {
                    let node = self.allocate_node(level)?;
                    cell.get_or_init(|| node)
                }
            };
            level = level.saturating_sub(1);
            match node {
                Node::Blocks(blocks) => return Ok(blocks),
                Node::Directory(children) => cell = entry(children, index(number, level)),
            }
        }
    }

    fn allocate_node(&mut self, level: u32) -> Result<Node, NoTable> {
        let spares = &self.table.spares;
        Ok(if level <= 1 {
            let make = || spares.take_blocks().or_else(|| empty_entries(Block::default));
            Node::Blocks(self.allocate(BLOCKS_BYTES, make)?)
        } else {
            let make = || spares.take_directory().or_else(|| empty_entries(OnceLock::new));
            Node::Directory(self.allocate(DIRECTORY_BYTES, make)?)
        })
    }

    /// A table of empty entries, within the bound.
    fn allocate<T>(
        &mut self,
        bytes: usize,
        make: impl FnOnce() -> Option<Box<[T; FANOUT]>>,
    ) -> Result<Box<[T; FANOUT]>, NoTable> {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let total = self.books.charge.amount().saturating_add(bytes);
        if usize::try_from(total).is_ok_and(|total| total > self.table.max_table_bytes) {
            return Err(NoTable::OutOfMemory);
        }
        let entries = make().ok_or(NoTable::OutOfMemory)?;
        self.books.charge.grow(bytes)?;
        Ok(entries)
    }

    /// Stores `first`, rising by `step` a page. The block in which this ends is filled on by whoever comes next.
    fn commit_words(&mut self, filling: &mut Option<Filling<'a>>, range: PageRange, first: u64, step: u64) {
        for part in blocks_of(range) {
            let word = first.wrapping_add(part.start.saturating_sub(range.start).wrapping_mul(step));
            let number = part.start >> FANOUT_BITS;
            if let Some(here) = filling
                && here.number == number
            {
                here.store(part, word, step);
                continue;
            }
            self.end_filling(filling.take());
            let block = match self.prepared {
                Some((prepared, block)) if prepared == number => block,
                _ => match self.obtain_block(number) {
                    Ok(block) => block,
                    Err(_) => panic!("page {:#x} was not prepared", part.start),
                },
            };
            if part.pages() == BLOCK_PAGES {
                self.commit_large(part, block, word | LARGE);
            } else {
                filling.insert(self.begin_filling(number, block)).store(part, word, step);
            }
        }
    }

    fn begin_filling(&mut self, number: u64, block: &'a Block) -> Filling<'a> {
        if block.is_large() {
            block.set_word(0);
            self.add_resident(0, BLOCK_PAGES);
        }
        let Some(leaf) = block.leaf.get() else { panic!("block {number:#x} was not prepared") };
        let before = block.present();
        Filling { number, block, leaf, present: before, before }
    }

    fn end_filling(&mut self, filling: Option<Filling<'a>>) {
        let Some(Filling { block, present, before, .. }) = filling else { return };
        block.set_word(present << PAGE_SHIFT);
        self.add_resident(present, before);
    }

    fn commit_large(&mut self, part: PageRange, block: &Block, word: u64) {
        if block.is_large() {
            block.set_word(word);
            return;
        }
        block.set_word(word);
        let replaced = block.leaf.get().map_or(0, |leaf| clear_entries(leaf, part, |_| true));
        if block.leaf.get().is_some() {
            self.note(part.start >> FANOUT_BITS, block);
        }
        self.add_resident(BLOCK_PAGES, replaced);
    }

    /// Drops the small translations of a whole block.
    fn clear_block(&mut self, number: u64, block: &Block) {
        let dropped = block.present();
        let Some(leaf) = block.leaf.get().filter(|_| dropped > 0) else { return };
        for_each_unrolled(leaf.as_slice(), |cell| cell.store(0, Ordering::Release));
        block.set_word(0);
        self.add_resident(0, dropped);
        self.note(number, block);
    }

    fn clear_small(&mut self, part: PageRange, block: &Block, hit: impl Fn(u64) -> bool) {
        let Some(leaf) = block.leaf.get() else { return };
        let before = block.present();
        if before == 0 {
            return;
        }
        let dropped = clear_entries(leaf, part, hit);
        let after = before.saturating_sub(dropped);
        block.set_word(after << PAGE_SHIFT);
        self.add_resident(0, dropped);
        if after == 0 {
            self.note(part.start >> FANOUT_BITS, block);
        }
    }

    fn drop_large(&mut self, number: u64, block: &Block) {
        block.set_word(0);
        self.add_resident(0, BLOCK_PAGES);
        self.note(number, block);
    }

    /// Notes a block whose tables may be freed, once. A block without a leaf is only noted for the block table that it
    /// is in, where one note is enough: millions of null blocks may go at once.
    fn note(&mut self, number: u64, block: &Block) {
        let table = Some(number >> FANOUT_BITS);
        if self.noted == table && block.leaf.get().is_none() {
            return;
        }
        let word = block.word.load(Ordering::Relaxed);
        if word & NOTED == 0 {
            if !self.note_number(number) {
                return;
            }
            block.word.store(word | NOTED, Ordering::Release);
        }
        self.noted = table;
    }

    /// Without memory for the note, the tables stay until the block is emptied again or the VM goes.
    fn note_number(&mut self, number: u64) -> bool {
        let noted = self.books.emptied.try_reserve(1).is_ok();
        if noted {
            self.books.emptied.push(number);
            self.table.emptied.store(self.books.emptied.len(), Ordering::Relaxed);
        }
        noted
    }

    fn add_resident(&self, added: u64, dropped: u64) {
        // Only editors write it, and they take turns.
        let pages = self.table.resident.load(Ordering::Relaxed).saturating_add(added).saturating_sub(dropped);
        self.table.resident.store(pages, Ordering::Relaxed);
    }

    /// Calls `f` with each existing block that the range touches, and with the pages of the range in it.
    fn visit(&mut self, range: PageRange, mut f: impl FnMut(&mut Self, PageRange, &'a Block)) {
        let table = self.table;
        let Some(range) = range.intersect(PageRange { start: 0, end: table.end }) else { return };
        if let Some(root) = table.root.get() {
            let mut each = |part, block| f(self, part, block);
            visit_blocks(root, table.top, 0, range, &mut each);
        }
    }
}

/// `base` is the first page that the node covers.
fn visit_blocks<'a>(
    node: &'a Node,
    level: u32,
    base: u64,
    range: PageRange,
    f: &mut dyn FnMut(PageRange, &'a Block),
) {
    let shift = FANOUT_BITS.saturating_mul(level);
    let first = range.start.saturating_sub(base).wrapping_shr(shift);
    let last = range.end.saturating_sub(1).saturating_sub(base).wrapping_shr(shift);
    for i in first..=last.min(BLOCK_PAGES - 1) {
        let start = base.saturating_add(i.wrapping_shl(shift));
        let covered = PageRange { start, end: start.saturating_add(1u64.wrapping_shl(shift)) };
        let Some(part) = range.intersect(covered) else { continue };
        match node {
            Node::Blocks(blocks) => f(part, entry(blocks, index(i, 0))),
            Node::Directory(children) => {
                if let Some(child) = entry(children, index(i, 0)).get() {
                    visit_blocks(child, level.saturating_sub(1), start, part, f);
                }
            }
        }
    }
}

/// Frees what is empty on the paths to these blocks (sorted), and returns the bytes.
fn prune(cell: &mut OnceLock<Node>, level: u32, blocks: &[u64], spares: &Spares) -> usize {
    let Some(node) = cell.get_mut() else { return 0 };
    let below = level.saturating_sub(1);
    let mut freed = 0usize;
    let (empty, bytes) = match node {
        Node::Directory(children) => {
            for group in blocks.chunk_by(|a, b| index(*a, below) == index(*b, below)) {
                let Some(child) = group.first().and_then(|b| children.get_mut(index(*b, below))) else {
                    continue;
                };
                freed = freed.saturating_add(prune(child, below, group, spares));
            }
            (children.iter().all(|child| child.get().is_none()), DIRECTORY_BYTES)
        }
        Node::Blocks(table) => {
            for number in blocks {
                let Some(block) = table.get_mut(index(*number, 0)) else { continue };
                *block.word.get_mut() &= !NOTED;
                // Under a large leaf the table of small ones is empty.
                if (block.is_large() || block.present() == 0)
                    && let Some(leaf) = block.leaf.take()
                {
                    spares.keep_leaf(leaf);
                    freed = freed.saturating_add(LEAF_BYTES);
                }
            }
            (table.iter().all(Block::is_empty), BLOCKS_BYTES)
        }
    };
    if empty && let Some(node) = cell.take() {
        spares.keep_node(node);
        freed = freed.saturating_add(bytes);
    }
    freed
}

/// Frees a node and what is below it, the leaves first, until no more may be freed.
fn demolish(cell: &mut OnceLock<Node>, left: &mut usize) {
    if *left == 0 {
        return;
    }
    match cell.get_mut() {
        Some(Node::Directory(children)) => children.iter_mut().for_each(|child| demolish(child, left)),
        Some(Node::Blocks(blocks)) => {
            let full = blocks.iter_mut().filter(|block| block.leaf.get().is_some());
            for block in full.take(*left) {
                block.leaf = OnceLock::new();
                *left = left.saturating_sub(1);
            }
        }
        None => return,
    }
    // What is left of it frees nothing but itself.
    if *left > 0 {
        *cell = OnceLock::new();
        *left = left.saturating_sub(1);
    }
}

/// Entries one by one, for those that are more than a word.
fn empty_entries<T>(empty: fn() -> T) -> Option<Box<[T; FANOUT]>> {
    let mut entries = Vec::new();
    entries.try_reserve_exact(FANOUT).ok()?;
    entries.resize_with(FANOUT, empty);
    entries.into_boxed_slice().try_into().ok()
}

/// Cuts a range at block boundaries.
fn blocks_of(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start | (BLOCK_PAGES - 1)).saturating_add(1).min(range.end);
        let part = PageRange { start, end };
        start = end;
        (part.start < part.end).then_some(part)
    })
}

fn miss(level: u32) -> Miss {
    Miss { level: u8::try_from(level).unwrap_or(u8::MAX) }
}

/// Index in a table `level` levels above the one that `number` counts entries of.
fn index(number: u64, level: u32) -> usize {
    (number.wrapping_shr(FANOUT_BITS.saturating_mul(level)) & (BLOCK_PAGES - 1)) as usize
}

#[expect(clippy::indexing_slicing, reason = "the index is masked to the length of the table")]
fn entry<T>(table: &[T; FANOUT], index: usize) -> &T {
    &table[index & (FANOUT - 1)]
}

const _: () = assert!(WRITABLE == ScatteredPage::WRITABLE);

#[cfg(test)]
mod tests;
