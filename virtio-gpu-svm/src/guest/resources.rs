//! Blob resources of a guest: which there are, and which contexts may use them. Called from the guest's queue thread.

use super::{Error, Guest};
use crate::protocol::limit::Limit;
use crate::quota::{Charge, Full};
use crate::resource::Blob;
use crate::sync::Arc;
use std::collections::BTreeSet;

/// A blob resource.
pub(super) struct Resource {
    pub(super) blob: Arc<Blob>,
    /// Contexts that may use it. Each an entry of its own: a hash table would keep the room of the most that there were.
    pub(super) attached: BTreeSet<u32>,
    /// Of the resource itself, which goes with it.
    _one: Charge,
    /// Of what describes the blob, and of attachments.
    bytes: Charge,
}

impl Resource {
    /// What an attachment takes: an entry of a tree.
    pub(super) const ATTACHMENT_BYTES: u64 = 16;

    fn attach(&mut self, ctx_id: u32) -> Result<(), Full> {
        if !self.attached.contains(&ctx_id) {
            self.bytes.grow(Self::ATTACHMENT_BYTES)?;
            self.attached.insert(ctx_id);
        }
        Ok(())
    }
    pub(super) fn detach(&mut self, ctx_id: u32) -> bool {
        let was_attached = self.attached.remove(&ctx_id);
        if was_attached {
            self.bytes.shrink(Self::ATTACHMENT_BYTES);
        }
        was_attached
    }
}

impl Guest {
    /// PROTOCOL 3.5.
    pub(crate) fn resource_create(&self, blob: Blob) -> Result<(), Error> {
        let mut inner = self.lock();
        let id = blob.resource_id;
        if inner.resources.contains_key(&id) {
            return Err(Error::ResourceExists(id));
        }
        let mut one = self.quota.charge(Limit::Resources);
        one.grow(1)?;
        let mut bytes = self.quota.charge(Limit::ResourceBytes);
        bytes.grow(blob.bytes())?;
        let resource = Resource { blob: Arc::new(blob), attached: BTreeSet::new(), _one: one, bytes };
        inner.resources.insert(id, resource);
        Ok(())
    }
    /// PROTOCOL 3.5.
    pub(crate) fn resource_attach(&self, ctx_id: u32, resource_id: u32) -> Result<(), Error> {
        let mut inner = self.lock();
        if !inner.contexts.contains_key(&ctx_id) {
            return Err(Error::NoContext(ctx_id));
        }
        let resource = inner.resources.get_mut(&resource_id).ok_or(Error::NoResource(resource_id))?;
        Ok(resource.attach(ctx_id)?)
    }
    /// PROTOCOL 3.5: its mappings in the context are unmapped.
    pub(crate) fn resource_detach(&self, ctx_id: u32, resource_id: u32) -> Result<(), Error> {
        let context = {
            let mut inner = self.lock();
            let context = inner.contexts.get(&ctx_id).cloned().ok_or(Error::NoContext(ctx_id))?;
            let resource = inner.resources.get_mut(&resource_id).ok_or(Error::NoResource(resource_id))?;
            if !resource.detach(ctx_id) {
                return Err(Error::NotAttached(resource_id));
            }
            context
        };
        context.unmap_blob(resource_id);
        Ok(())
    }
    /// PROTOCOL 3.5: the guest frees the pages after the answer, so it waits until engines have let go.
    pub(crate) fn resource_unref(&self, resource_id: u32) -> Result<(), Error> {
        let (attached, contexts) = {
            let mut inner = self.lock();
            let resource = inner.resources.remove(&resource_id).ok_or(Error::NoResource(resource_id))?;
            let attached = resource.attached.iter().filter_map(|ctx_id| inner.contexts.get(ctx_id).cloned());
            (attached.collect::<Vec<_>>(), inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        attached.iter().for_each(|context| context.unmap_blob(resource_id));
        let flushes = contexts.iter().flat_map(|context| context.flush_all()).collect();
        self.wait_flushed(flushes);
        self.wait_retired(&contexts);
        Ok(())
    }
    /// The blob of a resource that is attached to a context.
    pub(crate) fn attached_blob(&self, ctx_id: u32, resource_id: u32) -> Result<Arc<Blob>, Error> {
        let inner = self.lock();
        let resource = inner.resources.get(&resource_id).ok_or(Error::NoResource(resource_id))?;
        if !resource.attached.contains(&ctx_id) {
            return Err(Error::NotAttached(resource_id));
        }
        Ok(Arc::clone(&resource.blob))
    }
}
