//! A device that runs nothing: it remembers which VMs it has, claims two resident pages for each, and has a ledger that
//! the test wrote.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::{
    AddressModel, Asid, Device, DeviceInfo, Error, Extent, FaultModel, Flush, Job, LedgerEntry, StopId,
    Ticket, Verdict, VmLabel,
};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::quota::Charge;

/// A device of this name panics when it is asked for its ledger.
pub const BROKEN: &str = "broken";
/// Resident pages of each VM until it is evicted.
pub const RESIDENT: u64 = 2;

pub struct Idle {
    info: DeviceInfo,
    resident: Mutex<BTreeSet<Asid>>,
    destroyed: Mutex<Vec<Asid>>,
    ledger: Vec<LedgerEntry>,
}

impl Idle {
    pub fn start(name: &str, ledger: Vec<LedgerEntry>) -> Arc<dyn Device> {
        Self::new(name, ledger)
    }

    /// VMs that were destroyed since it was asked last: it is for the test to tell that they have retired.
    pub fn take_destroyed(&self) -> Vec<Asid> {
        std::mem::take(&mut self.destroyed.lock().unwrap())
    }

    pub fn new(name: &str, ledger: Vec<LedgerEntry>) -> Arc<Self> {
        let info = DeviceInfo {
            name: name.to_owned(),
            va_bits: 48,
            num_engines: 3,
            opcodes: 1,
            fault_model: FaultModel::Replayable,
            address_model: AddressModel::Any,
            null_mappings: false,
            exec: false,
        };
        Arc::new(Self { info, resident: Mutex::default(), destroyed: Mutex::default(), ledger })
    }
}

impl Device for Idle {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn vm_create(&self, asid: Asid, _label: VmLabel, _tables: Charge) -> Result<(), Error> {
        self.resident.lock().unwrap().insert(asid);
        Ok(())
    }
    fn vm_destroy(&self, asid: Asid) {
        self.resident.lock().unwrap().remove(&asid);
        self.destroyed.lock().unwrap().push(asid);
    }
    fn bind(&self, _asid: Asid, _addr: GpuAddr, _extents: &[Extent]) -> Result<(), Error> {
        Ok(())
    }
    fn unbind(&self, asid: Asid, _range: PageRange) -> Flush {
        self.resident.lock().unwrap().remove(&asid);
        Flush::Done
    }
    fn flush(&self, _asid: Asid) -> Flush {
        Flush::Done
    }
    fn has_flushed(&self, _asid: Asid, _ticket: Ticket) -> bool {
        true
    }
    fn drop_region(&self, _asid: Asid, _region_id: u64) {}
    fn resident_pages(&self, asid: Asid) -> u64 {
        if self.resident.lock().unwrap().contains(&asid) { RESIDENT } else { 0 }
    }
    fn resident_in(&self, asid: Asid, _range: PageRange) -> u64 {
        self.resident_pages(asid)
    }
    fn check_packets(&self, _packets: &[Packet]) -> Result<(), Error> {
        Ok(())
    }
    fn submit(&self, _asid: Asid, _job: Job) -> Result<(), Error> {
        Ok(())
    }
    fn resume(&self, _stop: StopId, _verdict: Verdict) {}
    fn set_frozen(&self, _asid: Asid, _frozen: bool) -> Flush {
        Flush::Done
    }
    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        assert_ne!(self.info.name, BROKEN, "a device with a defect");
        (self.ledger.clone(), 7)
    }
}
