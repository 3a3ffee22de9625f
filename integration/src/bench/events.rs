//! The event queue of a driver: buffers that are given back as soon as they are read.

use super::ring::{Buffer, Driver};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use virtio_gpu_svm::protocol::EVENTQ;
use virtio_gpu_svm::protocol::event::{
    EVENT_FAULT, EVENT_INVAL_DONE, EVENT_JOB_DONE, EVENT_RECORD_BYTES, EventHdr, FaultRecord, JobRecord,
    NoticeRecord,
};
use zerocopy::FromBytes;

const BUFFERS: u16 = 64;
const RECORDS: usize = 10;
const BYTES: usize = size_of::<EventHdr>() + RECORDS * EVENT_RECORD_BYTES;

/// A record.
#[derive(Clone, Copy, Debug)]
pub enum Record {
    /// A page is wanted.
    Fault(FaultRecord),
    /// A job has ended.
    Job(JobRecord),
    /// An invalidation is done.
    Done(NoticeRecord),
}

/// The event queue.
pub struct Events {
    buffers: u64,
    waiting: VecDeque<Record>,
}

impl Events {
    /// Gives the device all buffers.
    ///
    /// # Errors
    /// Guest memory is full.
    pub fn post(driver: &mut Driver) -> Result<Self> {
        let buffers = driver.ram().take_dma(u64::from(BUFFERS) * BYTES as u64)?;
        let ring = &mut driver.rings[usize::from(EVENTQ)];
        for index in 0..BUFFERS {
            let at = buffers + u64::from(index) * BYTES as u64;
            ring.write_chain(index, &[Buffer { at, bytes: BYTES as u64, writable: true }])?;
            ring.offer(index)?;
        }
        ring.publish()?;
        Ok(Self { buffers, waiting: VecDeque::new() })
    }

    /// The next record; waits for it.
    ///
    /// # Errors
    /// None comes, or the device wrote no record that is known here.
    pub fn next(&mut self, driver: &mut Driver) -> Result<Record> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                return Ok(record);
            }
            driver.rings[usize::from(EVENTQ)].await_used()?;
            self.collect(driver)?;
        }
    }

    /// The next record that is not about an invalidation, of which the answer has told already.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn next_but_done(&mut self, driver: &mut Driver) -> Result<Record> {
        loop {
            match self.next(driver)? {
                Record::Done(_) => {}
                other => return Ok(other),
            }
        }
    }

    /// The next record, if there is one.
    ///
    /// # Errors
    /// The device wrote no record that is known here.
    pub fn take(&mut self, driver: &mut Driver) -> Result<Option<Record>> {
        if self.waiting.is_empty() {
            self.collect(driver)?;
        }
        Ok(self.waiting.pop_front())
    }

    fn collect(&mut self, driver: &mut Driver) -> Result<()> {
        let ram = driver.ram().clone();
        let ring = &mut driver.rings[usize::from(EVENTQ)];
        while let Some((index, len)) = ring.take_used()? {
            let mut bytes = [0; BYTES];
            let written = bytes.get_mut(..len as usize).context("an event buffer is overfull")?;
            ram.read(self.buffers + u64::from(index) * BYTES as u64, written)?;
            let records = written.get(size_of::<EventHdr>()..).context("no event header")?;
            for record in records.chunks_exact(EVENT_RECORD_BYTES) {
                self.waiting.push_back(parse(record)?);
            }
            ring.offer(u16::try_from(index)?)?;
        }
        ring.publish()
    }
}

fn parse(record: &[u8]) -> Result<Record> {
    let kind = record.first_chunk().map(|kind| u32::from_le_bytes(*kind)).context("a short record")?;
    let parsed = match kind {
        EVENT_FAULT => FaultRecord::read_from_bytes(record).ok().map(Record::Fault),
        EVENT_JOB_DONE => JobRecord::read_from_bytes(record).ok().map(Record::Job),
        EVENT_INVAL_DONE => NoticeRecord::read_from_bytes(record).ok().map(Record::Done),
        _ => bail!("a record of kind {kind}"),
    };
    parsed.context("a short record")
}
