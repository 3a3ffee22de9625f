//! Names of the limits that -ENOSPC may be about: the same on the wire, in the daemon's configuration and for its
//! operator. PROTOCOL 9.

/// A limit. Those up to [`Limit::QueueBytes`] are the operator's to set; the others are the protocol's or a device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Limit {
    /// Contexts of a guest; retiring ones and undelivered CONTEXT_RETIRED records count.
    Contexts = 1,
    /// Blob resources of a guest.
    Resources = 2,
    /// Bytes that describe a guest's blob resources and where they are attached.
    ResourceBytes = 3,
    /// GPU VMs of a guest; retiring ones count.
    GpuVms = 4,
    /// Mappings of a GPU VM; also operations that asynchronous binds of a context have queued.
    Mappings = 5,
    /// Mappings of a guest; what asynchronous binds that are queued may add counts.
    TotalMappings = 6,
    /// Bytes of a guest's page tables: what is known of its processes' address spaces, and its GPU VMs' tables.
    TableBytes = 7,
    /// Faults of a context that wait for an answer.
    PendingFaults = 8,
    /// Faults of a guest that wait for an answer.
    TotalPendingFaults = 9,
    /// Jobs and asynchronous binds of a context in flight; undelivered records count.
    Jobs = 10,
    /// Jobs and asynchronous binds of a guest in flight; undelivered records count.
    TotalJobs = 11,
    /// Bytes of a guest's packets, operations, rings and page wishes that wait for their turn.
    QueueBytes = 12,
    /// Leaves of an address space.
    Leaves = 16,
    /// Pages that a GPU VM on a device without faults maps.
    ResidentPages = 17,
    /// Ids that a device has for GPU VMs.
    Asids = 18,
    /// GPU VMs that a device takes, of all guests.
    DeviceGpuVms = 19,
}

impl Limit {
    /// All, by number.
    pub const ALL: [Self; 16] = [
        Self::Contexts,
        Self::Resources,
        Self::ResourceBytes,
        Self::GpuVms,
        Self::Mappings,
        Self::TotalMappings,
        Self::TableBytes,
        Self::PendingFaults,
        Self::TotalPendingFaults,
        Self::Jobs,
        Self::TotalJobs,
        Self::QueueBytes,
        Self::Leaves,
        Self::ResidentPages,
        Self::Asids,
        Self::DeviceGpuVms,
    ];

    /// Its number on the wire; 0 is none.
    pub fn to_wire(self) -> u16 {
        u16::from(self as u8)
    }
    /// The limit of a number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|limit| limit.to_wire() == number)
    }
    /// Its name; of those that an operator sets, the key in `[limits]`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Contexts => "contexts",
            Self::Resources => "resources",
            Self::ResourceBytes => "resource_bytes",
            Self::GpuVms => "gpu_vms",
            Self::Mappings => "mappings",
            Self::TotalMappings => "total_mappings",
            Self::TableBytes => "table_bytes",
            Self::PendingFaults => "pending_faults",
            Self::TotalPendingFaults => "total_pending_faults",
            Self::Jobs => "jobs",
            Self::TotalJobs => "total_jobs",
            Self::QueueBytes => "queue_bytes",
            Self::Leaves => "leaves",
            Self::ResidentPages => "resident_pages",
            Self::Asids => "asids",
            Self::DeviceGpuVms => "device_gpu_vms",
        }
    }
    /// Whose it is, for people: `"guest"`, `"context"`, `"gpu vm"` or `"device"`.
    pub fn scope(self) -> &'static str {
        match self {
            Self::Contexts
            | Self::Resources
            | Self::ResourceBytes
            | Self::GpuVms
            | Self::TotalMappings
            | Self::TableBytes
            | Self::TotalPendingFaults
            | Self::TotalJobs
            | Self::QueueBytes => "guest",
            Self::PendingFaults | Self::Jobs | Self::Leaves => "context",
            Self::Mappings | Self::ResidentPages => "gpu vm",
            Self::Asids | Self::DeviceGpuVms => "device",
        }
    }
    /// Whether `[limits]` of the daemon's configuration sets it.
    pub fn is_configured(self) -> bool {
        self <= Self::QueueBytes
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_leads_back_to_its_limit() {
        let numbers: Vec<u16> = Limit::ALL.iter().map(|limit| limit.to_wire()).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        for limit in Limit::ALL {
            assert_eq!(Limit::from_wire(limit.to_wire()), Some(limit));
        }
        assert_eq!((Limit::from_wire(0), Limit::from_wire(13)), (None, None));
    }
}
