//! The GPU VMs of a context: at most one a device, so few that each is looked for from the first on. They stand in one
//! block of just their size: nearly every context has one, and what is larger than a GPU VM is held as often.

use crate::gpu_vm::GpuVm;

/// GPU VMs by their id, in the manner of a map.
#[derive(Debug, Default)]
pub(crate) struct Vms {
    /// By rising id.
    list: Vec<(u32, GpuVm)>,
}

impl Vms {
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }
    /// One of them.
    #[inline]
    pub(crate) fn get(&self, vm_id: &u32) -> Option<&GpuVm> {
        self.list.iter().find(|(id, _)| id == vm_id).map(|(_, vm)| vm)
    }
    /// The same, to be changed.
    #[inline]
    pub(crate) fn get_mut(&mut self, vm_id: &u32) -> Option<&mut GpuVm> {
        self.list.iter_mut().find(|(id, _)| id == vm_id).map(|(_, vm)| vm)
    }
    /// Whether there is one of this id.
    pub(crate) fn contains_key(&self, vm_id: &u32) -> bool {
        self.get(vm_id).is_some()
    }
    /// By rising id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&u32, &GpuVm)> {
        self.list.iter().map(|(id, vm)| (id, vm))
    }
    /// The ids, rising.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &u32> {
        self.iter().map(|(id, _)| id)
    }
    /// By rising id.
    pub(crate) fn values(&self) -> impl Iterator<Item = &GpuVm> {
        self.iter().map(|(_, vm)| vm)
    }
    /// The same, to be changed.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut GpuVm> {
        self.list.iter_mut().map(|(_, vm)| vm)
    }
    /// Adds one.
    pub(crate) fn insert(&mut self, vm_id: u32, vm: GpuVm) {
        let at = self.list.partition_point(|(id, _)| *id < vm_id);
        self.list.reserve_exact(1);
        self.list.insert(at, (vm_id, vm));
    }
    /// Takes one out.
    pub(crate) fn remove(&mut self, vm_id: &u32) -> Option<GpuVm> {
        let at = self.list.iter().position(|(id, _)| id == vm_id)?;
        let (_, vm) = self.list.remove(at);
        self.list.shrink_to_fit();
        Some(vm)
    }
}
