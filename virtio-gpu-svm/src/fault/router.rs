//! From the id in a device's fault report to the one owner of the fault.
//!
//! One router per device. An asid is taken when a context gets its GPU VM there and given back only when the device
//! has confirmed that nothing of it is left, and ids go round, so that a late report never finds a new owner.

use crate::context::Context;
use crate::device::{ASID_END, Asid};
use crate::numbered::Numbered;
use crate::seeded::{self, Bug};
use crate::sync::{Arc, PoisonError, RwLock};
use std::collections::hash_map::Entry;

/// Who owns an asid.
#[derive(Clone)]
pub struct Owner {
    /// The context.
    pub context: Arc<Context>,
    /// The GPU VM in it.
    pub vm_id: u32,
}

/// The asids of one device.
#[derive(Default)]
pub struct Router {
    /// Guards the table only; nothing is called under it.
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    owners: Numbered<Asid, Owner>,
    /// The asid taken last.
    last: u32,
    #[cfg(feature = "sabotage")]
    swapped: bool,
}

impl Router {
    /// Takes the next free asid for an owner; none when all are taken.
    pub fn take_asid(&self, owner: Owner) -> Option<Asid> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if seeded::on(Bug::ReuseAsid) {
            table.last = 0;
            table.owners.retain(|_, owner| !owner.context.is_retiring());
        }
        for _ in 1..ASID_END {
            let next = table.last.saturating_add(1);
            table.last = if next < ASID_END { next } else { 1 };
            let asid = Asid(table.last);
            if let Entry::Vacant(free) = table.owners.entry(asid) {
                free.insert(owner);
                return Some(asid);
            }
        }
        None
    }
    /// The owner of an asid.
    pub fn lookup_owner(&self, asid: Asid) -> Option<Owner> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.owners.get(&asid).cloned()
    }
    /// The owner to whom a fault goes: the owner of its asid.
    pub fn route(&self, asid: Asid) -> Option<Owner> {
        #[cfg(feature = "sabotage")]
        {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if table.swapped {
                let neighbour =
                    Asid(if asid.0 % 2 == 1 { asid.0.wrapping_add(1) } else { asid.0.wrapping_sub(1) });
                return table.owners.get(&neighbour).or_else(|| table.owners.get(&asid)).cloned();
            }
        }
        self.lookup_owner(asid)
    }
    /// Gives an asid back.
    pub fn free_asid(&self, asid: Asid) -> Option<Owner> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.owners.remove(&asid)
    }
    /// How many asids are taken.
    pub fn taken(&self) -> usize {
        self.table.read().unwrap_or_else(PoisonError::into_inner).owners.len()
    }
    /// Misroutes the faults of neighbours to each other from now on.
    #[cfg(feature = "sabotage")]
    pub fn swap_neighbours(&self) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).swapped = true;
    }
}
