//! Addresses that cannot be confused: guest CPU (A side), guest-physical, and GPU (C side). Ranges are half-open,
//! page aligned and not empty once made, so that code beyond the boundary need not check again.

use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further, if there is one.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
            /// The page that holds this address.
            pub fn page(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
            /// The first address of the page that holds this one.
            pub fn page_start(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
        }
        impl std::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}
address! {
    /// A CPU address of a guest process: the A side.
    GuestVa
}
address! {
    /// A guest-physical address.
    GuestPa
}
address! {
    /// An address of a GPU VM: the C side.
    GpuAddr
}

/// Why a range was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Start or length is not a multiple of the page size.
    #[error("range {start:#x}+{length:#x} is not page aligned")]
    Unaligned {
        /// Its start.
        start: u64,
        /// Its bytes.
        length: u64,
    },
    /// No bytes.
    #[error("range at {start:#x} is empty")]
    Empty {
        /// Its start.
        start: u64,
    },
    /// It wraps or ends beyond the space.
    #[error("range {start:#x}+{length:#x} ends beyond {end:#x}")]
    OutOfSpace {
        /// Its start.
        start: u64,
        /// Its bytes.
        length: u64,
        /// First address beyond the space.
        end: u64,
    },
}

/// Pages `[start, end)` of one of the address spaces, as page numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// First page.
    pub start: u64,
    /// First page beyond.
    pub end: u64,
}

impl PageRange {
    /// Checks bytes `[start, start + length)` against a space that ends at `space_end`.
    ///
    /// # Errors
    /// [`RangeError`], in the order of its variants.
    pub fn from_bytes(start: u64, length: u64, space_end: u64) -> Result<Self, RangeError> {
        if !start.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, length });
        }
        if length == 0 {
            return Err(RangeError::Empty { start });
        }
        match start.checked_add(length) {
            Some(end) if end <= space_end => Ok(Self { start: start >> PAGE_SHIFT, end: end >> PAGE_SHIFT }),
            _ => Err(RangeError::OutOfSpace { start, length, end: space_end }),
        }
    }
    /// Pages in it.
    pub fn pages(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
    /// Address of its first byte.
    pub fn start_addr(self) -> u64 {
        self.start << PAGE_SHIFT
    }
    /// Address of the first byte beyond.
    pub fn end_addr(self) -> u64 {
        self.end << PAGE_SHIFT
    }
    /// Whether a page lies in it.
    pub fn contains(self, page: u64) -> bool {
        self.start <= page && page < self.end
    }
    /// The same pages as few ranges: sorted, and those that touch or overlap joined.
    pub fn merge(mut ranges: Vec<Self>) -> Vec<Self> {
        ranges.sort_unstable();
        ranges.dedup_by(|range, last| {
            let touches = range.start <= last.end;
            if touches {
                last.end = last.end.max(range.end);
            }
            touches
        });
        ranges
    }
    /// What both have, if anything.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_merged() {
        let range = |start, end| PageRange { start, end };
        let merged = PageRange::merge(vec![range(7, 9), range(1, 3), range(2, 4), range(4, 5), range(7, 8)]);
        assert_eq!(merged, [range(1, 5), range(7, 9)]);
        assert_eq!(PageRange::merge(vec![]), []);
    }
}
