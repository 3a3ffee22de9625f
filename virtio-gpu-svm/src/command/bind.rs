//! Operations of a VM_BIND: xe's argument rules as far as there are such arguments here, and what a kind of device adds
//! to them. PROTOCOL 5.3.

use super::{Error, Result, zero};
use crate::addr::PageRange;
use crate::context::Bind;
use crate::device::{AddressModel, DeviceInfo, FaultModel};
use crate::gpu_vm::{Backing, GpuVa};
use crate::guest::Guest;
use crate::population::MAX_PREFETCH_PAGES;
use crate::protocol::request::*;
use crate::protocol::{GUEST_VA_END, PAGE_SHIFT};
use crate::sync::Arc;

/// Whose operations these are, and for which device.
pub struct BindRules<'a> {
    /// The guest.
    pub guest: &'a Arc<Guest>,
    /// The context in it.
    pub ctx_id: u32,
    /// The device of the GPU VM.
    pub device: &'a DeviceInfo,
}

impl BindRules<'_> {
    /// Checks operations.
    ///
    /// # Errors
    /// The first that is refused, by its index.
    pub fn check(&self, ops: &[BindOp]) -> Result<Vec<Bind>> {
        let mut left = MAX_PREFETCH_PAGES;
        let mut check = |op: &BindOp| {
            let bind = match self.device.address_model {
                AddressModel::Any => self.bind(op)?,
                AddressModel::Identity => self.identity(op)?,
            };
            if let Bind::MapImmediate(GpuVa { range, .. }) | Bind::Prefetch(range) = &bind {
                left = left.checked_sub(range.pages()).ok_or(Error::Count)?;
            }
            Ok(bind)
        };
        let mut binds = Vec::with_capacity(ops.len());
        for (index, op) in (0..).zip(ops) {
            binds.push(check(op).map_err(|error: Error| error.at(index))?);
        }
        Ok(binds)
    }

    fn bind(&self, op: &BindOp) -> Result<Bind> {
        let known = BIND_READONLY | BIND_IMMEDIATE | BIND_NULL | BIND_CPU_ADDR_MIRROR | BIND_EXEC;
        let (flags, resource_id, offset) = (op.flags.get(), op.resource_id.get(), op.obj_offset.get());
        zero(op.reserved.get() == 0 && op.reserved2.get() == 0 && flags & !known == 0)?;
        if op.op.get() == BIND_OP_UNMAP_ALL {
            zero(op.addr.get() == 0 && op.range.get() == 0 && offset == 0 && flags == 0)?;
            let blob = self.guest.attached_blob(self.ctx_id, resource_id)?;
            return Ok(Bind::UnmapAll(blob.resource_id));
        }
        let has = |flag: u32| flags & flag != 0;
        if (has(BIND_NULL) || has(BIND_CPU_ADDR_MIRROR)) && op.op.get() != BIND_OP_MAP {
            return Err(Error::Value);
        }
        let space_end = 1_u64.checked_shl(self.device.va_bits).unwrap_or(u64::MAX);
        let range = PageRange::from_bytes(op.addr.get(), op.range.get(), space_end)?;
        let backing = match op.op.get() {
            BIND_OP_UNMAP | BIND_OP_PREFETCH => {
                zero(resource_id == 0 && offset == 0 && flags == 0)?;
                let unmap = op.op.get() == BIND_OP_UNMAP;
                return Ok(if unmap { Bind::Unmap(range) } else { Bind::Prefetch(range) });
            }
            BIND_OP_MAP if has(BIND_NULL) => {
                // There is nothing to protect from writes that are swallowed.
                zero(resource_id == 0 && offset == 0 && !has(BIND_CPU_ADDR_MIRROR) && !has(BIND_READONLY))?;
                Backing::Null
            }
            BIND_OP_MAP if has(BIND_CPU_ADDR_MIRROR) => {
                zero(resource_id == 0)?;
                let offset = offset.cast_signed();
                let cpu = range.start_addr().checked_add_signed(offset).ok_or(Error::Value)?;
                PageRange::from_bytes(cpu, op.range.get(), GUEST_VA_END)?;
                Backing::Mirror(offset >> PAGE_SHIFT)
            }
            BIND_OP_MAP => {
                let blob = self.guest.attached_blob(self.ctx_id, resource_id)?;
                let end = blob.pages.checked_shl(PAGE_SHIFT).ok_or(Error::Value)?;
                Backing::Blob(blob, PageRange::from_bytes(offset, op.range.get(), end)?.start)
            }
            BIND_OP_MAP_USERPTR => {
                zero(resource_id == 0)?;
                Backing::Userptr(PageRange::from_bytes(offset, op.range.get(), GUEST_VA_END)?.start)
            }
            _ => return Err(Error::Value),
        };
        self.supported(&backing, has(BIND_EXEC))?;
        let va = GpuVa { range, backing, readonly: has(BIND_READONLY) };
        Ok(if has(BIND_IMMEDIATE) { Bind::MapImmediate(va) } else { Bind::Map(va) })
    }

    /// Whether the device has such mappings.
    fn supported(&self, backing: &Backing, exec: bool) -> Result<()> {
        let supported = match backing {
            Backing::Mirror(_) => self.device.fault_model != FaultModel::None,
            Backing::Null => self.device.null_mappings,
            Backing::Userptr(_) | Backing::Blob(..) => true,
        };
        if supported && (self.device.exec || !exec) { Ok(()) } else { Err(Error::Unsupported) }
    }

    /// On a device without mappings of its own the process' addresses are there already, and nothing else can be: what
    /// asks for them is carried out by doing nothing.
    fn identity(&self, op: &BindOp) -> Result<Bind> {
        let same = |va: &GpuVa| match va.backing {
            Backing::Userptr(page) => page == va.range.start,
            Backing::Mirror(offset) => offset == 0,
            Backing::Blob(..) | Backing::Null => false,
        };
        match self.bind(op)? {
            Bind::Map(va) | Bind::MapImmediate(va)
                if va.readonly || matches!(va.backing, Backing::Blob(..) | Backing::Null) =>
            {
                Err(Error::Unsupported)
            }
            Bind::Map(va) | Bind::MapImmediate(va) if !same(&va) => Err(Error::Value),
            // The place of an operation that does nothing: of its pages none.
            Bind::Map(GpuVa { range: PageRange { start, .. }, .. }) => {
                Ok(Bind::Prefetch(PageRange { start, end: start }))
            }
            Bind::MapImmediate(GpuVa { range, .. }) | Bind::Prefetch(range) => Ok(Bind::Prefetch(range)),
            Bind::Unmap(_) | Bind::UnmapAll(_) => Err(Error::Unsupported),
        }
    }
}
