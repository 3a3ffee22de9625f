//! A soft device that panics in the call that it is told to panic in, once.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{
    Asid, Device, DeviceInfo, Error, Events, Extent, Flush, Job, LedgerEntry, StopId, Ticket, Verdict,
    VmLabel,
};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::quota::Charge;

pub struct Brittle {
    inner: Arc<SoftDevice>,
    armed: Mutex<Option<&'static str>>,
    engine: Mutex<Option<JoinHandle<()>>>,
}

impl Brittle {
    pub fn new() -> Arc<Self> {
        let inner = SoftDevice::new(SoftConfig { name: "brittle0".into(), ..SoftConfig::default() });
        Arc::new(Self { inner, armed: Mutex::default(), engine: Mutex::default() })
    }
    pub fn start(&self, events: Weak<dyn Events>) {
        self.inner.start(events);
        let device = Arc::clone(&self.inner);
        *self.engine.lock().unwrap() = Some(std::thread::spawn(move || device.run_engine(0)));
    }
    pub fn stop(&self) {
        self.inner.shutdown();
        let engine = self.engine.lock().unwrap().take();
        engine.unwrap().join().unwrap();
    }
    /// The next call of this method panics.
    pub fn arm(&self, method: &'static str) {
        *self.armed.lock().unwrap() = Some(method);
    }
    /// Whether it has not panicked yet.
    pub fn is_armed(&self) -> bool {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
    fn sound(&self, method: &str) -> &SoftDevice {
        let hit = self.armed.lock().unwrap().take_if(|armed| *armed == method).is_some();
        assert!(!hit, "a device that panics in {method}, on purpose");
        &self.inner
    }
}

impl Device for Brittle {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }
    fn vm_create(&self, asid: Asid, label: VmLabel, tables: Charge) -> Result<(), Error> {
        self.sound("vm_create").vm_create(asid, label, tables)
    }
    fn vm_destroy(&self, asid: Asid) {
        self.sound("vm_destroy").vm_destroy(asid);
    }
    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        self.sound("bind").bind(asid, addr, extents)
    }
    fn bind_null(&self, asid: Asid, range: PageRange) -> Result<(), Error> {
        self.sound("bind_null").bind_null(asid, range)
    }
    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        self.sound("unbind").unbind(asid, range)
    }
    fn flush(&self, asid: Asid) -> Flush {
        self.sound("flush").flush(asid)
    }
    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        self.sound("has_flushed").has_flushed(asid, ticket)
    }
    fn drop_region(&self, asid: Asid, region_id: u64) {
        self.sound("drop_region").drop_region(asid, region_id);
    }
    fn resident_pages(&self, asid: Asid) -> u64 {
        self.sound("resident_pages").resident_pages(asid)
    }
    fn resident_in(&self, asid: Asid, range: PageRange) -> u64 {
        self.sound("resident_in").resident_in(asid, range)
    }
    fn check_packets(&self, packets: &[Packet]) -> Result<(), Error> {
        self.sound("check_packets").check_packets(packets)
    }
    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error> {
        self.sound("submit").submit(asid, job)
    }
    fn resume(&self, stop: StopId, verdict: Verdict) {
        self.sound("resume").resume(stop, verdict);
    }
    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush {
        self.sound("set_frozen").set_frozen(asid, frozen)
    }
    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        self.inner.ledger()
    }
}
