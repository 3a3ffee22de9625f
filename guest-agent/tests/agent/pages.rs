//! Memory of processes as a device has it: arenas by guest-physical address, and what a GPU finds through the agent's
//! answers.

use crate::mock::{self, Mock};
use guest_agent::agent::{ArenaMemory, ArenaPages, ImportedPages};
use guest_agent::memory_file::MemoryFile;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Memory that is read and written by guest-physical address.
#[derive(Default)]
pub struct Memory {
    made: AtomicU64,
    /// Pages by guest-physical address: the file and the offset in it.
    pages: Mutex<HashMap<u64, (Arc<File>, u64)>>,
    /// What holds pages that are the processes' own.
    pub rings: Mutex<HashMap<u64, OwnedFd>>,
}

impl Memory {
    fn name(&self) -> u64 {
        self.made.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A part of a file becomes memory; its pages. Neighbours in the file are none in guest memory.
    fn add(&self, file: OwnedFd, offset: u64, len: u64) -> (u64, Vec<u64>) {
        assert!(len <= 1 << 31, "an arena of {len:#x} bytes");
        let (id, file) = (self.name(), Arc::new(File::from(file)));
        let addresses: Vec<u64> = (0..len / 4096).map(|page| (id << 32) + page * 8192).collect();
        let places = (offset..).step_by(4096).map(|at| (file.clone(), at));
        self.pages.lock().unwrap().extend(addresses.iter().copied().zip(places));
        (id, addresses)
    }

    /// The file that has a page, and where. `None`: there is no such page, or no longer.
    fn place(&self, page: u64) -> Option<(Arc<File>, u64)> {
        self.pages.lock().unwrap().get(&page).cloned()
    }
}

impl ArenaMemory for Memory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let fd = mock::file(len);
        let (id, pages) = self.add(fd.try_clone()?, 0, len);
        Ok(ArenaPages { id, fd, offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let (id, pages) = self.add(file.as_fd().try_clone_to_owned()?, file.offset(), file.len());
        Ok(ImportedPages { id, pages })
    }

    fn hold(&self, ring: OwnedFd) -> io::Result<u64> {
        let id = self.name();
        self.rings.lock().unwrap().insert(id, ring);
        Ok(id)
    }

    fn release(&self, id: u64) {
        self.rings.lock().unwrap().remove(&id);
        self.pages.lock().unwrap().retain(|page, _| page >> 32 != id);
    }
}

/// What a GPU that works for a context finds at CPU addresses.
///
/// It asks once for each page, as a device does: after a change of the process' memory take another one.
pub struct View<'a> {
    mock: &'a Mock,
    memory: &'a Memory,
    pub ctx_id: u32,
    known: RefCell<HashMap<u64, u64>>,
}

impl<'a> View<'a> {
    pub fn new(mock: &'a Mock, memory: &'a Memory, ctx_id: u32) -> Self {
        Self { mock, memory, ctx_id, known: RefCell::default() }
    }

    /// Where a page is in guest memory. `None`: the agent refuses.
    pub fn physical(&self, page: u64) -> Option<u64> {
        let cookie = self.mock.script(|script| script.fault(self.ctx_id, page));
        let holds = |va: u64, pages: u32| (va..va + u64::from(pages) * 4096).contains(&page);
        let answer = self.mock.answered(cookie);
        let run = answer.runs.iter().find(|run| holds(run.va.get(), run.pages.get()))?;
        Some(run.gpa.get() + page - run.va.get())
    }

    /// The file that has a byte, and where.
    fn place(&self, address: u64) -> Option<(Arc<File>, u64)> {
        let (page, within) = (address & !4095, address & 4095);
        let known = self.known.borrow().get(&page).copied();
        let physical = known.or_else(|| self.physical(page))?;
        self.known.borrow_mut().insert(page, physical);
        self.memory.place(physical).map(|(file, offset)| (file, offset + within))
    }

    /// The word at an aligned address. `None`: it is out of reach.
    pub fn word(&self, address: u64) -> Option<u64> {
        let (file, offset) = self.place(address)?;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, offset).unwrap();
        Some(u64::from_le_bytes(word))
    }

    pub fn set_word(&self, address: u64, word: u64) -> Option<()> {
        let (file, offset) = self.place(address)?;
        file.write_all_at(&word.to_le_bytes(), offset).unwrap();
        Some(())
    }
}
