//! Tables that are empty again, kept for whoever needs one next.
//!
//! A process that makes a few pages resident and withdraws them, over and over, needs a way of tables from the root each
//! time: to have them from the heap, and to write and to look through their entries, is more than all the rest of it. A
//! device keeps a few for all its GPU VMs. They are nobody's while they are here: a GPU VM is charged for what it uses.
//!
//! What is kept has only empty entries, so nothing of one guest is in what another gets.

use super::{Block, FANOUT, Leaf, Node};
use crate::sync::{Mutex, MutexGuard, OnceLock, TryLockError};

/// Tables kept of each kind.
const KEPT: usize = 16;

/// See the module.
#[derive(Default)]
pub struct Spares {
    /// Guards the lists; a section moves one table, and nobody waits for it.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    leaves: Vec<Box<Leaf>>,
    blocks: Vec<Box<[Block; FANOUT]>>,
    directories: Vec<Box<[OnceLock<Node>; FANOUT]>>,
}

impl Spares {
    pub(super) fn take_leaf(&self) -> Option<Box<Leaf>> {
        self.kept()?.leaves.pop()
    }
    pub(super) fn take_blocks(&self) -> Option<Box<[Block; FANOUT]>> {
        self.kept()?.blocks.pop()
    }
    pub(super) fn take_directory(&self) -> Option<Box<[OnceLock<Node>; FANOUT]>> {
        self.kept()?.directories.pop()
    }
    /// Of a leaf without pages.
    pub(super) fn keep_leaf(&self, leaf: Box<Leaf>) {
        if let Some(mut kept) = self.kept() {
            keep(&mut kept.leaves, leaf);
        }
    }
    /// Of a table without children.
    pub(super) fn keep_node(&self, node: Node) {
        let Some(mut kept) = self.kept() else { return };
        match node {
            Node::Directory(directory) => keep(&mut kept.directories, directory),
            Node::Blocks(blocks) => keep(&mut kept.blocks, blocks),
        }
    }
    fn kept(&self) -> Option<MutexGuard<'_, Kept>> {
        match self.kept.try_lock() {
            Ok(kept) => Some(kept),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

fn keep<T>(list: &mut Vec<T>, table: T) {
    if list.len() < KEPT && list.try_reserve_exact(KEPT.saturating_sub(list.len())).is_ok() {
        list.push(table);
    }
}
