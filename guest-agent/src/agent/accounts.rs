//! What arenas take of the limits, as running sums: refusing a request costs the same however many arenas there are.
//!
//! An arena counts from before its memory is made until its maker has taken the memory back. Between the two it may be
//! nobody's: on its way in, out, or with a context that the daemon has lost. The kernel unpins what a ring held some 10 to
//! 20 ms after it was let go (Linux 6.18); for so long there may be more than the limits say.

use super::{AgentOptions, Error, Result};
use crate::message::AgentLimit;
use std::collections::HashMap;

/// What an arena costs its maker beside its pages, whatever its size: the io_uring that pins it (24.6 KiB of kernel
/// memory on Linux 6.18), descriptors, and entries in tables.
pub const ARENA_OVERHEAD_BYTES: u64 = 32 << 10;

/// Arenas, and bytes of them.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    arenas: usize,
    bytes: u64,
}

/// The most that a sum may be.
#[derive(Clone, Copy)]
struct Most {
    arenas: (AgentLimit, usize),
    bytes: (AgentLimit, u64),
}

impl Sum {
    /// With one more, unless that is beyond one of the limits.
    fn with(self, len: u64, most: Most) -> Result<Self> {
        let sum = Self { arenas: self.arenas + 1, bytes: self.bytes.saturating_add(len) };
        let (which, limit) = most.arenas;
        if sum.arenas > limit {
            return Err(Error::TooMany { which, limit });
        }
        let overhead = ARENA_OVERHEAD_BYTES.saturating_mul(u64::try_from(sum.arenas).unwrap_or(u64::MAX));
        let (which, limit) = most.bytes;
        if sum.bytes.saturating_add(overhead) > limit {
            return Err(Error::Quota { which, limit });
        }
        Ok(sum)
    }

    fn without(self, len: u64) -> Self {
        Self { arenas: self.arenas - 1, bytes: self.bytes - len }
    }
}

/// The sums.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    total: Sum,
    /// Of users that have any.
    users: HashMap<u32, Sum>,
}

impl Accounts {
    /// Counts one more arena of a user.
    ///
    /// # Errors
    /// [`Error::TooMany`], [`Error::Quota`].
    pub(super) fn charge(&mut self, uid: u32, len: u64, options: &AgentOptions) -> Result<()> {
        let of_user = self.users.get(&uid).copied().unwrap_or_default();
        let user = Most {
            arenas: (AgentLimit::UserArenas, options.user_arenas),
            bytes: (AgentLimit::UserMemory, options.user_arena_bytes),
        };
        let all = Most {
            arenas: (AgentLimit::TotalArenas, options.total_arenas),
            bytes: (AgentLimit::TotalMemory, options.total_arena_bytes),
        };
        let of_user = of_user.with(len, user)?;
        self.total = self.total.with(len, all)?;
        self.users.insert(uid, of_user);
        Ok(())
    }

    /// The memory of one is its maker's again, or was never made.
    pub(super) fn discharge(&mut self, uid: u32, len: u64) {
        self.total = self.total.without(len);
        let of_user = self.users.get(&uid).copied().unwrap_or_default().without(len);
        match of_user.arenas {
            0 => drop(self.users.remove(&uid)),
            _ => drop(self.users.insert(uid, of_user)),
        }
    }

    /// Bytes of all arenas, without what they cost beside.
    pub(super) fn bytes(&self) -> u64 {
        self.total.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes for so many pages in so many arenas.
    fn bytes(pages: u64, arenas: u64) -> u64 {
        pages * 4096 + arenas * ARENA_OVERHEAD_BYTES
    }

    #[test]
    fn sums_are_those_of_what_is_there() {
        let options = AgentOptions {
            user_arena_bytes: bytes(5, 2),
            total_arena_bytes: bytes(8, 3),
            user_arenas: 2,
            total_arenas: 4,
            ..AgentOptions::default()
        };
        let mut accounts = Accounts::default();
        let mut charge = |uid, pages| accounts.charge(uid, pages * 4096, &options);
        charge(1, 3).unwrap();
        assert!(matches!(charge(1, 3), Err(Error::Quota { limit, .. }) if limit == bytes(5, 2)));
        charge(1, 2).unwrap();
        assert!(matches!(charge(1, 0), Err(Error::TooMany { limit: 2, .. })));
        assert!(matches!(charge(2, 4), Err(Error::Quota { limit, .. }) if limit == bytes(8, 3)));
        charge(2, 3).unwrap();
        assert!(matches!(charge(3, 1), Err(Error::Quota { .. })));
        assert!(matches!(charge(3, u64::MAX / 4096), Err(Error::Quota { .. })));
        assert_eq!(accounts.bytes(), 8 * 4096);
        for (uid, pages) in [(1, 2), (2, 3), (1, 3)] {
            accounts.discharge(uid, pages * 4096);
        }
        assert!(accounts.bytes() == 0 && accounts.users.is_empty() && accounts.total.arenas == 0);
    }
}
