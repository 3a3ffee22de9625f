//! What forked children have of memory that is not in the table, or may leave it: globals, and stacks.

use crate::piece::InChild;
use std::ops::Range;

/// Most ranges that are remembered. What is said of others holds until the memory is moved.
const MOST: usize = 64;

/// Ranges of which a child has less than a copy, as the program has last said.
pub struct Advised {
    entries: [(usize, usize, InChild); MOST],
    count: usize,
}

impl Advised {
    pub const fn new() -> Self {
        Self { entries: [(0, 0, InChild::Copy); MOST], count: 0 }
    }

    /// Takes note of what the program says.
    pub fn add(&mut self, range: &Range<usize>, in_child: InChild) {
        if self.count == 0 && in_child == InChild::Copy {
            return;
        }
        let before = std::mem::replace(self, Self::new());
        for &(start, end, said) in before.entries() {
            self.push(start..end.min(range.start), said);
            self.push(start.max(range.end)..end, said);
        }
        if in_child != InChild::Copy {
            self.push(range.clone(), in_child);
        }
    }

    fn push(&mut self, range: Range<usize>, in_child: InChild) {
        let entry = self.entries.get_mut(self.count).filter(|_| !range.is_empty());
        if let Some(entry) = entry {
            *entry = (range.start, range.end, in_child);
            self.count += 1;
        }
    }

    fn entries(&self) -> &[(usize, usize, InChild)] {
        self.entries.get(..self.count).unwrap_or_default()
    }

    /// What a child has of the first byte of a range, and where that ends.
    pub fn first(&self, range: &Range<usize>) -> (InChild, usize) {
        let mut first = (InChild::Copy, range.end);
        for &(start, end, in_child) in self.entries() {
            if (start..end).contains(&range.start) {
                return (in_child, end.min(range.end));
            }
            if start > range.start {
                first.1 = first.1.min(start);
            }
        }
        first
    }
}
