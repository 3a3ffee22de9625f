//! A SUBMIT_3D payload: requests of an unprivileged process about its own context. No guest-physical address appears
//! in it, and none would be believed. PROTOCOL 5.
//!
//! Requests are carried out in order and end at the first refusal. Each has its reply at the place it names in the
//! reply area; that the reply fits is checked before the request takes effect.

use super::bind::BindRules;
use super::fence::{Waits, launch, with_waits};
use super::{Error, Refusal, Result, whole, zero};
use crate::context::Context;
use crate::gpu_vm::State;
use crate::guest::Guest;
use crate::protocol::job::Packet;
use crate::protocol::request::*;
use crate::protocol::{MAX_BINDS, MAX_PACKETS, MAX_REQUESTS, MAX_RESPONSE_BYTES};
use crate::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Whose requests these are.
pub struct Submission<'a> {
    /// The guest.
    pub guest: &'a Arc<Guest>,
    /// The context.
    pub context: &'a Arc<Context>,
    /// Whether the driver wants the response when everything has been done.
    pub fenced: bool,
}

/// A request's index, and why it was refused.
type Refused = (u32, Refusal);

impl Submission<'_> {
    /// Carries out a payload. Appends the reply area to `out`, at most `room` bytes, and returns the request that was
    /// refused, if any.
    ///
    /// # Errors
    /// The payload is no list of requests; nothing was done.
    pub fn run(&self, payload: &[u8], out: &mut Vec<u8>, room: usize) -> Result<Option<Refused>> {
        let requests = split(payload)?;
        let mut area = ReplyArea { start: out.len(), out, room: room.min(MAX_RESPONSE_BYTES) };
        for (index, (hdr, bytes)) in (0..).zip(requests) {
            if let Err(error) = self.request(&hdr, bytes, &mut area) {
                let refusal = error.refusal();
                area.refuse(&hdr, refusal);
                return Ok(Some((index, refusal)));
            }
        }
        Ok(None)
    }

    fn request(&self, hdr: &ReqHdr, bytes: &[u8], area: &mut ReplyArea) -> Result<()> {
        match hdr.cmd.get() {
            SVM_REQ_VM_CREATE => self.vm_create(hdr, bytes, area),
            SVM_REQ_VM_DESTROY => {
                let request: VmRef = whole(bytes)?;
                zero(request.reserved.get() == 0)?;
                area.reserve::<RspHdr>(hdr)?;
                self.context.vm_destroy(request.vm_id.get())?;
                area.put(hdr, RspHdr::default());
                Ok(())
            }
            SVM_REQ_VM_BIND => self.vm_bind(hdr, bytes, area),
            SVM_REQ_EXEC => self.exec(hdr, bytes, area),
            SVM_REQ_VM_GET_PROPERTY => self.vm_get_property(hdr, bytes, area),
            other => Err(Error::UnknownCommand(other)),
        }
    }

    fn vm_create(&self, hdr: &ReqHdr, bytes: &[u8], area: &mut ReplyArea) -> Result<()> {
        let request: VmCreate = whole(bytes)?;
        zero(request.flags.get() == 0 && request.reserved.get() == 0)?;
        area.reserve::<VmCreateRsp>(hdr)?;
        let dev_id = request.dev_id.get();
        let device = self.guest.host_device(dev_id).ok_or(Error::NoDevice(dev_id))?;
        let (vm_id, asid) = self.context.vm_create(dev_id, device)?;
        let va_bits = self.guest.host().device_of(device).info().va_bits;
        area.put(
            hdr,
            VmCreateRsp {
                vm_id: vm_id.into(),
                asid: asid.0.into(),
                va_bits: va_bits.into(),
                ..VmCreateRsp::default()
            },
        );
        Ok(())
    }

    fn vm_bind(&self, hdr: &ReqHdr, bytes: &[u8], area: &mut ReplyArea) -> Result<()> {
        let Waits { request, waits, list: ops } =
            with_waits::<VmBind, BindOp>(bytes, |request| (request.num_waits, request.num_binds), MAX_BINDS)?;
        if ops.is_empty() {
            return Err(Error::Count);
        }
        let flags = request.flags.get();
        zero(request.reserved.get() == 0 && flags & !VM_BIND_ASYNC == 0)?;
        let launch = if flags & VM_BIND_ASYNC == 0 {
            let VmBind { ring_idx, user_data, signal, .. } = request;
            zero(ring_idx.get() == 0 && user_data.get() == 0 && signal.get() == 0 && waits.is_empty())?;
            None
        } else if self.fenced {
            return Err(Error::Unsupported);
        } else {
            let line = (request.vm_id, request.ring_idx);
            Some(launch(line, request.user_data, request.signal, waits)?)
        };
        area.reserve::<VmBindRsp>(hdr)?;
        let vm_id = request.vm_id.get();
        let device = self.context.vm_device(vm_id)?;
        let device = self.guest.host().device_of(device).info();
        let rules = BindRules { guest: self.guest, ctx_id: self.context.ctx_id, device };
        let binds = rules.check(ops)?;
        let job_id = match launch {
            Some(launch) => self.context.bind_async(launch, binds)?.0,
            None => {
                let bound = self.context.bind(vm_id, &binds);
                bound.map_err(|refused| Error::from(refused.error).at(refused.op))?;
                0
            }
        };
        area.put(hdr, VmBindRsp { job_id: job_id.into(), ..VmBindRsp::default() });
        Ok(())
    }

    fn exec(&self, hdr: &ReqHdr, bytes: &[u8], area: &mut ReplyArea) -> Result<()> {
        let Waits { request, waits, list: packets } = with_waits::<Exec, Packet>(
            bytes,
            |request| (request.num_waits, request.num_packets),
            MAX_PACKETS,
        )?;
        if packets.is_empty() {
            return Err(Error::Count);
        }
        let line = (request.vm_id, request.ring_idx);
        let launch = launch(line, request.user_data, request.signal, waits)?;
        // A response held back until a job is done would break the order of responses; the job's record tells.
        if self.fenced {
            return Err(Error::Unsupported);
        }
        area.reserve::<ExecRsp>(hdr)?;
        let job = self.context.exec(launch, packets.to_vec())?;
        area.put(hdr, ExecRsp { job_id: job.0.into(), ..ExecRsp::default() });
        Ok(())
    }

    fn vm_get_property(&self, hdr: &ReqHdr, bytes: &[u8], area: &mut ReplyArea) -> Result<()> {
        let request: VmRef = whole(bytes)?;
        zero(request.reserved.get() == 0)?;
        area.reserve::<VmProperty>(hdr)?;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let property = self.context.vm_property(request.vm_id.get(), |vm, resident_pages| {
            let (state, errno, op, addr) = match vm.state {
                State::Usable => (VM_USABLE, 0, 0, 0),
                State::Unusable { errno, op, addr } => (VM_UNUSABLE, errno, op, addr),
            };
            VmProperty {
                state: state.into(),
                first_errno: errno.saturating_neg().into(),
                error_addr: addr.into(),
                resident_pages: resident_pages.into(),
                num_mappings: count(vm.mappings.len()).into(),
                num_jobs: count(vm.jobs).into(),
                pending_faults: count(vm.pending_faults).into(),
                asid: vm.asid.0.into(),
                dev_id: vm.dev_id.into(),
                error_op: op.into(),
                ..VmProperty::default()
            }
        })?;
        area.put(hdr, property);
        Ok(())
    }
}

/// Cuts a payload into requests; all headers are checked before the first request is carried out.
fn split(payload: &[u8]) -> Result<impl Iterator<Item = (ReqHdr, &[u8])>> {
    let mut count = 0_usize;
    for request in Requests(payload) {
        request?;
        count = count.saturating_add(1);
        if count > MAX_REQUESTS {
            return Err(Error::Count);
        }
    }
    if count == 0 { Err(Error::Length) } else { Ok(Requests(payload).map_while(Result::ok)) }
}

/// Whether all requests of a payload are done within microseconds: they launch jobs, or ask.
pub fn is_brief(payload: &[u8]) -> bool {
    let brief = |hdr: &ReqHdr| matches!(hdr.cmd.get(), SVM_REQ_EXEC | SVM_REQ_VM_GET_PROPERTY);
    Requests(payload).all(|request| request.is_ok_and(|(hdr, _)| brief(&hdr)))
}

/// The rest of a payload. Its end is the end, or the first thing that is no request.
struct Requests<'a>(&'a [u8]);

impl<'a> Iterator for Requests<'a> {
    type Item = Result<(ReqHdr, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = std::mem::take(&mut self.0);
        (!rest.is_empty()).then(|| {
            let (hdr, _) = ReqHdr::read_from_prefix(rest).map_err(|_| Error::Length)?;
            let len = usize::try_from(hdr.len.get()).map_err(|_| Error::Length)?;
            if len < size_of::<ReqHdr>() || !len.is_multiple_of(8) || !hdr.rsp_off.get().is_multiple_of(8) {
                return Err(Error::Length);
            }
            let (request, after) = rest.split_at_checked(len).ok_or(Error::Length)?;
            self.0 = after;
            Ok((hdr, request))
        })
    }
}

/// The device-writable bytes behind the response's head.
struct ReplyArea<'a> {
    /// The response so far; what no reply covers is zero.
    out: &'a mut Vec<u8>,
    /// Where the area begins in it.
    start: usize,
    /// Most bytes of the area.
    room: usize,
}

impl ReplyArea<'_> {
    /// Makes sure that a reply fits.
    fn reserve<T>(&mut self, hdr: &ReqHdr) -> Result<()> {
        let start = usize::try_from(hdr.rsp_off.get()).map_err(|_| Error::Length)?;
        let end = start.checked_add(size_of::<T>()).filter(|end| *end <= self.room).ok_or(Error::Length)?;
        let end = end.saturating_add(self.start);
        if self.out.len() < end {
            self.out.resize(end, 0);
        }
        Ok(())
    }
    /// Writes a reply whose header is still empty.
    fn put<T: IntoBytes + Immutable>(&mut self, hdr: &ReqHdr, reply: T) {
        self.write(hdr, reply.as_bytes(), Refusal::default());
    }
    /// Writes the header of a refusal, if it fits.
    fn refuse(&mut self, hdr: &ReqHdr, refusal: Refusal) {
        if self.reserve::<RspHdr>(hdr).is_ok() {
            self.write(hdr, RspHdr::default().as_bytes(), refusal);
        }
    }
    fn write(&mut self, hdr: &ReqHdr, reply: &[u8], refusal: Refusal) {
        let start = usize::try_from(hdr.rsp_off.get()).unwrap_or(usize::MAX);
        let start = start.saturating_add(self.start);
        let Some(place) = self.out.get_mut(start..).and_then(|rest| rest.get_mut(..reply.len())) else {
            unreachable!("the reply was reserved");
        };
        place.copy_from_slice(reply);
        let head = RspHdr {
            len: u32::try_from(reply.len()).unwrap_or(u32::MAX).into(),
            seqno: hdr.seqno,
            ret: refusal.status().into(),
            detail: refusal.detail().into(),
            limit: refusal.limit().into(),
        };
        if head.write_to_prefix(place).is_err() {
            unreachable!("every reply begins with a header");
        }
    }
}
