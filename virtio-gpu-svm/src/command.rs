//! Bytes of a control-queue command -> checked command -> the one dispatch -> response. PROTOCOL 3, 4, 5.
//!
//! The only boundary: beyond it ranges are aligned and inside their space, counts are inside their limits, reserved
//! fields are zero, and objects belong to the context that named them. The bytes are the daemon's own copy.

mod bind;
mod fence;
mod pages;
pub mod submit;

use crate::addr::{PageRange, RangeError};
use crate::context::{self, Context, NewContext};
use crate::device::{self, AddressModel, FaultModel};
use crate::fault::response::{self, Code, Supplied};
use crate::guest::{self, Guest};
use crate::memory::{GUEST_PA_END, MemoryTable};
use crate::protocol::control::*;
use crate::protocol::errno::{
    EACCES, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSPC, EOPNOTSUPP, EPIPE,
};
use crate::protocol::gpu::*;
use crate::protocol::limit::Limit;
use crate::protocol::{
    CAPSET_SVM, CAPSET_SVM_VERSION, GUEST_VA_END, MAX_BINDS, MAX_BLOB_ENTRIES, MAX_COMMAND_BYTES, MAX_RUNS,
    PAGE_SHIFT, SvmConfig, VERSION_MAJOR, VERSION_MINOR,
};
use crate::quota::Full;
use crate::resource::Blob;
use crate::sync::Arc;
use crate::timeline;
use pages::Pages;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Why a command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Shorter or longer than what it says it holds.
    #[error("the command's length does not fit its contents")]
    Length,
    /// Not a command of this device.
    #[error("unknown command {0:#x}")]
    UnknownCommand(u32),
    /// Our command, before HELLO.
    #[error("no HELLO in this session")]
    NoHello,
    /// A version that is not spoken here.
    #[error("protocol version {0:#x} is not spoken")]
    Version(u32),
    /// A reserved field or unknown flag is set.
    #[error("a reserved field or an unknown flag is not zero")]
    Reserved,
    /// A number beyond its limit.
    #[error("a count is 0 or beyond its limit")]
    Count,
    /// A value without meaning.
    #[error("a field has a value without meaning")]
    Value,
    /// No such host device.
    #[error("no device {0}")]
    NoDevice(u32),
    /// The device cannot do this.
    #[error("not supported")]
    Unsupported,
    /// A range was refused.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Outside guest memory.
    #[error("outside guest memory")]
    NoMemory,
    /// Contexts and resources.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// Within a context.
    #[error(transparent)]
    Context(#[from] context::Error),
    /// Pages and answers.
    #[error(transparent)]
    Pages(#[from] response::Error),
    /// One of several: a run, an entry, a bind or a request.
    #[error("number {index} was refused")]
    At {
        /// Which.
        index: u32,
        /// Its errno.
        errno: i32,
        /// The limit that this is about.
        limit: Option<Limit>,
    },
}

impl Error {
    /// Positive errno. PROTOCOL 8.
    pub fn errno(&self) -> i32 {
        match self {
            Self::UnknownCommand(_) | Self::Unsupported | Self::Version(_) => EOPNOTSUPP,
            Self::NoHello => EPIPE,
            Self::Length | Self::Reserved | Self::Value | Self::Count | Self::Range(_) => EINVAL,
            Self::NoDevice(_) => ENOENT,
            Self::NoMemory => EFAULT,
            Self::Guest(error) => match error {
                guest::Error::NoContext(_) | guest::Error::NoResource(_) => ENOENT,
                guest::Error::ContextExists(_) | guest::Error::ResourceExists(_) => EEXIST,
                guest::Error::Full(_) => ENOSPC,
                guest::Error::NotAttached(_) => EACCES,
            },
            Self::Context(error) => error.errno(),
            Self::Pages(error) => error.errno(),
            Self::At { errno, .. } => *errno,
        }
    }
    /// The nearest response of virtio-gpu. PROTOCOL 8.
    fn response(&self) -> u32 {
        match self {
            Self::Guest(guest::Error::NoContext(_)) => VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID,
            Self::Guest(guest::Error::ContextExists(_)) => VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID,
            Self::Guest(
                guest::Error::NoResource(_) | guest::Error::ResourceExists(_) | guest::Error::NotAttached(_),
            ) => VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID,
            Self::UnknownCommand(_) | Self::NoHello | Self::Unsupported => VIRTIO_GPU_RESP_ERR_UNSPEC,
            other => match other.errno() {
                ENOSPC | ENOMEM => VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY,
                EINVAL | EFAULT | ENOENT => VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER,
                EACCES | EBUSY | EEXIST => VIRTIO_GPU_RESP_ERR_UNSPEC,
                _ => VIRTIO_GPU_RESP_ERR_UNSPEC,
            },
        }
    }
    /// The same, said of one of several.
    fn at(self, index: u32) -> Self {
        Self::At { index, errno: self.errno(), limit: self.limit() }
    }
    /// The limit that -ENOSPC is about. PROTOCOL 9.
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::Guest(guest::Error::Full(Full(limit))) => Some(*limit),
            Self::Context(error) => error.limit(),
            Self::Pages(error) => error.limit(),
            Self::At { limit, .. } => *limit,
            Self::Guest(_)
            | Self::Length
            | Self::UnknownCommand(_)
            | Self::NoHello
            | Self::Version(_)
            | Self::Reserved
            | Self::Count
            | Self::Value
            | Self::NoDevice(_)
            | Self::Unsupported
            | Self::Range(_)
            | Self::NoMemory => None,
        }
    }
    fn refusal(&self) -> Refusal {
        Refusal { errno: self.errno(), detail: self.detail(), limit: self.limit() }
    }
    fn detail(&self) -> u32 {
        match self {
            Self::At { index, .. } => *index,
            Self::Pages(error) => error.index(),
            Self::Context(context::Error::Device(
                device::Error::UnknownOpcode { index } | device::Error::BadOperand { index },
            )) => *index,
            Self::Context(context::Error::Point(
                timeline::Error::NoVm { index } | timeline::Error::Future { index },
            )) => *index,
            _ => 0,
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// What the guest is told of a refusal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// Positive errno; 0: it was none.
    pub errno: i32,
    /// Index of what it is about.
    pub detail: u32,
    /// The limit that it is about.
    pub limit: Option<Limit>,
}

impl Refusal {
    fn status(&self) -> i32 {
        self.errno.saturating_neg()
    }
    /// Every list on the wire has at most 65,536 entries.
    fn detail(&self) -> u16 {
        u16::try_from(self.detail).unwrap_or(u16::MAX)
    }
    fn limit(&self) -> u16 {
        self.limit.map_or(0, Limit::to_wire)
    }
}
const _: () = assert!(MAX_BLOB_ENTRIES <= 1 << 16 && MAX_RUNS <= 1 << 16 && MAX_BINDS <= 1 << 16);

/// A response under way: what was asked, and where the answer goes.
struct Answer<'a> {
    guest: &'a Arc<Guest>,
    request: CtrlHdr,
    /// The context of the request, once it was looked up.
    context: Option<Arc<Context>>,
    out: &'a mut Vec<u8>,
    room: usize,
}

impl Answer<'_> {
    fn header(&self, kind: u32) -> CtrlHdr {
        let fenced = self.request.flags.get() & VIRTIO_GPU_FLAG_FENCE != 0;
        let kept = VIRTIO_GPU_FLAG_FENCE | VIRTIO_GPU_FLAG_INFO_RING_IDX;
        CtrlHdr {
            kind: kind.into(),
            flags: if fenced { self.request.flags.get() & kept } else { 0 }.into(),
            fence_id: if fenced { self.request.fence_id } else { 0.into() },
            ctx_id: self.request.ctx_id,
            ring_idx: if fenced { self.request.ring_idx } else { 0 },
            padding: [0; 3],
        }
    }
    fn head(&self, kind: u32, refusal: Refusal) -> SvmResp {
        let inval_done_seq = match &self.context {
            Some(context) => context.inval_done_seq(),
            None => {
                self.guest.context(self.request.ctx_id.get()).map_or(0, |context| context.inval_done_seq())
            }
        };
        SvmResp {
            hdr: self.header(kind),
            status: refusal.status().into(),
            detail: refusal.detail().into(),
            limit: refusal.limit().into(),
            daemon_epoch: self.guest.epoch().into(),
            inval_done_seq: inval_done_seq.into(),
        }
    }
    fn context(&mut self) -> Result<Arc<Context>> {
        let context = self.guest.context(self.request.ctx_id.get())?;
        self.context = Some(Arc::clone(&context));
        Ok(context)
    }
    /// A response in virtio-gpu's own layout.
    fn put<T: IntoBytes + Immutable>(&mut self, response: &T) {
        self.out.extend_from_slice(response.as_bytes());
    }
    fn ok(&self) -> SvmResp {
        self.head(VIRTIO_GPU_RESP_OK_NODATA, Refusal::default())
    }
}

/// Carries out one command; `response` gets at most `room` bytes.
pub fn control(guest: &Arc<Guest>, request: &[u8], response: &mut Vec<u8>, room: usize) {
    response.clear();
    let Ok((hdr, _)) = CtrlHdr::read_from_prefix(request) else {
        let mut answer = Answer { guest, request: CtrlHdr::default(), context: None, out: response, room };
        answer.refuse(&Error::Length);
        return;
    };
    let mut answer = Answer { guest, request: hdr, context: None, out: response, room };
    let result =
        if request.len() > MAX_COMMAND_BYTES { Err(Error::Length) } else { answer.dispatch(request) };
    match result {
        Ok(()) => answer.trim(),
        Err(error) => answer.refuse(&error),
    }
}

/// Bytes of a command that may be brief, and pages that it may name.
const BRIEF_BYTES: usize = 256;
const BRIEF_PAGES: u64 = 64;

/// See [`Guest::is_brief`]. What changes mappings or ends something is not: it takes as long as what was there is large.
pub fn is_brief(request: &[u8]) -> bool {
    let Ok((hdr, _)) = CtrlHdr::read_from_prefix(request) else { return true };
    if request.len() > BRIEF_BYTES {
        return false;
    }
    match hdr.kind.get() {
        VIRTIO_GPU_CMD_GET_DISPLAY_INFO
        | VIRTIO_GPU_CMD_GET_CAPSET_INFO
        | VIRTIO_GPU_CMD_GET_CAPSET
        | VIRTIO_GPU_CMD_SVM_GET_DEVICE => true,
        VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE => {
            let read = PageResponse::read_from_prefix(request).map_err(|_| Error::Length);
            let pages = read.and_then(|(cmd, rest)| Pages::read(rest, cmd.num_runs, cmd.flags));
            pages.is_ok_and(|pages| pages.largest_run() <= BRIEF_PAGES)
        }
        VIRTIO_GPU_CMD_SUBMIT_3D => {
            CmdSubmit::read_from_prefix(request).is_ok_and(|(_, payload)| submit::is_brief(payload))
        }
        _ => false,
    }
}

/// Carries out one command of the cursor queue: there is no display, and so no cursor. PROTOCOL 2.3.
pub fn cursor(guest: &Arc<Guest>, request: &[u8], response: &mut Vec<u8>, room: usize) {
    response.clear();
    let hdr = CtrlHdr::read_from_prefix(request).map(|(hdr, _)| hdr).unwrap_or_default();
    let mut answer = Answer { guest, request: hdr, context: None, out: response, room };
    let error = match hdr.kind.get() {
        VIRTIO_GPU_CMD_UPDATE_CURSOR | VIRTIO_GPU_CMD_MOVE_CURSOR => Error::Unsupported,
        other => Error::UnknownCommand(other),
    };
    answer.refuse(&error);
}

/// The command's fixed part, which must be all of it.
fn whole<T: FromBytes>(request: &[u8]) -> Result<T> {
    T::read_from_bytes(request).map_err(|_| Error::Length)
}

/// The command's fixed part, and `count` elements that must be all the rest. The count is compared with its limit and
/// with the bytes that are there before anything is allocated.
fn with_list<T, E>(request: &[u8], count: impl Fn(&T) -> u32, limit: u32) -> Result<(T, &[E])>
where
    T: FromBytes,
    E: FromBytes + Immutable + KnownLayout,
{
    let (fixed, rest) = T::read_from_prefix(request).map_err(|_| Error::Length)?;
    let list = elements(rest, count(&fixed), limit)?;
    Ok((fixed, list))
}

/// `count` elements that must be all the rest.
fn elements<E: FromBytes + Immutable + KnownLayout>(rest: &[u8], count: u32, limit: u32) -> Result<&[E]> {
    if count > limit {
        return Err(Error::Count);
    }
    let count = usize::try_from(count).map_err(|_| Error::Count)?;
    <[E]>::ref_from_bytes_with_elems(rest, count).map_err(|_| Error::Length)
}

fn zero(all_zero: bool) -> Result<()> {
    if all_zero { Ok(()) } else { Err(Error::Reserved) }
}

impl Answer<'_> {
    /// Writes the refusal in place of whatever was written.
    fn refuse(&mut self, error: &Error) {
        self.out.clear();
        let head = self.head(error.response(), error.refusal());
        self.put(&head);
        self.trim();
    }
    /// Leaves no more than there is room for; of our head, either all or virtio-gpu's header alone.
    fn trim(&mut self) {
        let header = size_of::<CtrlHdr>();
        let head_alone = self.out.len() == size_of::<SvmResp>() && self.room < self.out.len();
        self.out.truncate(if head_alone { self.room.min(header) } else { self.room });
    }

    fn dispatch(&mut self, request: &[u8]) -> Result<()> {
        let known = VIRTIO_GPU_FLAG_FENCE | VIRTIO_GPU_FLAG_INFO_RING_IDX;
        zero(self.request.flags.get() & !known == 0 && self.request.padding == [0; 3])?;
        match self.request.kind.get() {
            VIRTIO_GPU_CMD_GET_DISPLAY_INFO => self.get_display_info(request),
            VIRTIO_GPU_CMD_GET_CAPSET_INFO => self.get_capset_info(request),
            VIRTIO_GPU_CMD_GET_CAPSET => self.get_capset(request),
            VIRTIO_GPU_CMD_CTX_CREATE => self.ctx_create(request),
            VIRTIO_GPU_CMD_CTX_DESTROY => self.ctx_destroy(request),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => self.resource_create_blob(request),
            VIRTIO_GPU_CMD_RESOURCE_UNREF => self.resource_unref(request),
            VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE => self.ctx_resource(request, Guest::resource_attach),
            VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => self.ctx_resource(request, Guest::resource_detach),
            VIRTIO_GPU_CMD_SUBMIT_3D => self.submit_3d(request),
            VIRTIO_GPU_CMD_SVM_HELLO => self.hello(request),
            VIRTIO_GPU_CMD_SVM_GET_DEVICE => self.greeted()?.get_device(request),
            VIRTIO_GPU_CMD_SVM_SUPPLY => self.greeted()?.supply(request),
            VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE => self.greeted()?.page_response(request),
            VIRTIO_GPU_CMD_SVM_INVALIDATE => self.greeted()?.invalidate(request),
            other => Err(Error::UnknownCommand(other)),
        }
    }
    /// Our commands need a HELLO in this session: after a loss of state nothing else is answered. PROTOCOL 4.1.
    fn greeted(&mut self) -> Result<&mut Self> {
        if self.guest.greeted() { Ok(self) } else { Err(Error::NoHello) }
    }
    fn done(&mut self) -> Result<()> {
        let head = self.ok();
        self.put(&head);
        Ok(())
    }

    fn get_display_info(&mut self, request: &[u8]) -> Result<()> {
        whole::<CtrlHdr>(request)?;
        let hdr = self.header(VIRTIO_GPU_RESP_OK_DISPLAY_INFO);
        self.put(&RespDisplayInfo { hdr, ..RespDisplayInfo::default() });
        Ok(())
    }
    fn get_capset_info(&mut self, request: &[u8]) -> Result<()> {
        let cmd: GetCapsetInfo = whole(request)?;
        zero(cmd.padding.get() == 0)?;
        if cmd.capset_index.get() != 0 {
            return Err(Error::Value);
        }
        let hdr = self.header(VIRTIO_GPU_RESP_OK_CAPSET_INFO);
        self.put(&RespCapsetInfo {
            hdr,
            capset_id: CAPSET_SVM.into(),
            capset_max_version: CAPSET_SVM_VERSION.into(),
            capset_max_size: u32::try_from(size_of::<SvmConfig>()).map_err(|_| Error::Value)?.into(),
            padding: 0.into(),
        });
        Ok(())
    }
    fn get_capset(&mut self, request: &[u8]) -> Result<()> {
        let cmd: GetCapset = whole(request)?;
        if cmd.capset_id.get() != CAPSET_SVM || cmd.capset_version.get() > CAPSET_SVM_VERSION {
            return Err(Error::Value);
        }
        let hdr = self.header(VIRTIO_GPU_RESP_OK_CAPSET);
        self.put(&hdr);
        let capset = self.guest.capset();
        self.put(&capset);
        Ok(())
    }
    fn ctx_create(&mut self, request: &[u8]) -> Result<()> {
        let cmd: CtxCreate = whole(request)?;
        let (ctx_id, init) = (self.request.ctx_id.get(), cmd.context_init.get());
        zero(init & !VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK == 0)?;
        let capset_id = init & VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK;
        // A driver without CONTEXT_INIT says 0; there is only one capset to mean.
        if ctx_id == 0 || (capset_id != 0 && capset_id != CAPSET_SVM) {
            return Err(Error::Value);
        }
        let name = usize::try_from(cmd.nlen.get()).ok().and_then(|nlen| cmd.debug_name.get(..nlen));
        let name = name.ok_or(Error::Value)?.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).replace(is_unprintable, "?");
        self.guest.context_create(NewContext { ctx_id, name, capset_id: CAPSET_SVM })?;
        self.done()
    }
    fn ctx_destroy(&mut self, request: &[u8]) -> Result<()> {
        whole::<CtrlHdr>(request)?;
        self.guest.context_destroy(self.request.ctx_id.get())?;
        self.done()
    }
    fn resource_create_blob(&mut self, request: &[u8]) -> Result<()> {
        let (cmd, entries) =
            with_list::<ResourceCreateBlob, MemEntry>(request, |cmd| cmd.nr_entries.get(), MAX_BLOB_ENTRIES)?;
        let known = VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE
            | VIRTIO_GPU_BLOB_FLAG_USE_SHAREABLE
            | VIRTIO_GPU_BLOB_FLAG_USE_CROSS_DEVICE;
        zero(cmd.blob_flags.get() & !known == 0)?;
        if cmd.blob_mem.get() != VIRTIO_GPU_BLOB_MEM_GUEST {
            return Err(Error::Unsupported);
        }
        if cmd.resource_id.get() == 0 || cmd.blob_id.get() != 0 {
            return Err(Error::Value);
        }
        let size = PageRange::from_bytes(0, cmd.size.get(), GUEST_PA_END)?;
        let memory = self.guest.memory();
        let mut pages = Vec::with_capacity(entries.len());
        for (index, entry) in (0..).zip(entries) {
            pages.push(blob_entry(entry, &memory).map_err(|error| error.at(index))?);
        }
        if pages.iter().map(|(_, pages)| *pages).fold(0, u64::saturating_add) != size.pages() {
            return Err(Error::Length);
        }
        self.guest.resource_create(Blob::new(cmd.resource_id.get(), pages.into_iter()))?;
        self.done()
    }
    fn resource_unref(&mut self, request: &[u8]) -> Result<()> {
        let cmd: CtxResource = whole(request)?;
        zero(cmd.padding.get() == 0)?;
        self.guest.resource_unref(cmd.resource_id.get())?;
        self.done()
    }
    fn ctx_resource(
        &mut self,
        request: &[u8],
        act: impl Fn(&Guest, u32, u32) -> std::result::Result<(), guest::Error>,
    ) -> Result<()> {
        let cmd: CtxResource = whole(request)?;
        zero(cmd.padding.get() == 0)?;
        act(self.guest, self.request.ctx_id.get(), cmd.resource_id.get())?;
        self.done()
    }

    fn hello(&mut self, request: &[u8]) -> Result<()> {
        let cmd: Hello = whole(request)?;
        zero(cmd.reserved.get() == 0)?;
        if cmd.version.get() >> 16 != u32::from(VERSION_MAJOR) {
            return Err(Error::Version(cmd.version.get()));
        }
        debug_assert_eq!(VERSION_MINOR, 0, "a higher minor version must look at what the driver speaks");
        if cmd.incarnation.get() == 0 || self.request.ctx_id.get() != 0 {
            return Err(Error::Value);
        }
        let greeting = self.guest.hello(cmd.incarnation.get());
        let resp = self.ok();
        self.put(&HelloResp {
            resp,
            num_devices: greeting.num_devices.into(),
            retiring: greeting.retiring.into(),
            reserved: 0.into(),
        });
        Ok(())
    }
    fn get_device(&mut self, request: &[u8]) -> Result<()> {
        let cmd: GetDevice = whole(request)?;
        zero(cmd.reserved.get() == 0)?;
        if self.request.ctx_id.get() != 0 {
            return Err(Error::Value);
        }
        let dev_id = cmd.dev_id.get();
        let index = self.guest.host_device(dev_id).ok_or(Error::NoDevice(dev_id))?;
        let info = self.guest.host().device_of(index).info().clone();
        let mut name = [0; 32];
        name.iter_mut().zip(info.name.bytes()).for_each(|(to, from)| *to = from);
        let flag = |has: bool, flag: u64| if has { flag } else { 0 };
        let resp = self.ok();
        self.put(&GetDeviceResp {
            resp,
            dev_id: dev_id.into(),
            va_bits: info.va_bits.into(),
            fault_model: match info.fault_model {
                FaultModel::Replayable => 0,
                FaultModel::KernelResolved => 1,
                FaultModel::None => 2,
            }
            .into(),
            address_model: match info.address_model {
                AddressModel::Any => 0,
                AddressModel::Identity => 1,
            }
            .into(),
            opcodes: info.opcodes.into(),
            name,
            num_engines: info.num_engines.into(),
            page_shift: PAGE_SHIFT.into(),
            flags: (flag(info.null_mappings, DEVICE_NULL) | flag(info.exec, DEVICE_EXEC)).into(),
        });
        Ok(())
    }
    fn supply(&mut self, request: &[u8]) -> Result<()> {
        let (cmd, rest) = Supply::read_from_prefix(request).map_err(|_| Error::Length)?;
        let pages = Pages::read(rest, cmd.num_runs, cmd.flags)?;
        zero(cmd.reserved.get() == 0)?;
        if pages.is_empty() {
            return Err(Error::Count);
        }
        let supplied = match pages {
            Pages::Runs(runs) => {
                let runs = pages::checked_runs(runs)?;
                self.context()?.supply(runs)?
            }
            Pages::List(list, entries) => {
                let runs = pages::checked_list(list, entries)?;
                self.context()?.supply(runs)?
            }
        };
        self.supplied(supplied)
    }
    fn page_response(&mut self, request: &[u8]) -> Result<()> {
        let (cmd, rest) = PageResponse::read_from_prefix(request).map_err(|_| Error::Length)?;
        let pages = Pages::read(rest, cmd.num_runs, cmd.flags)?;
        let code = Code::from_wire(cmd.code.get()).ok_or(Error::Value)?;
        let cookie = cmd.cookie.get();
        let supplied = match pages {
            Pages::Runs(runs) => {
                let runs = pages::checked_runs(runs)?;
                self.context()?.respond(cookie, code, runs)?
            }
            Pages::List(list, entries) => {
                let runs = pages::checked_list(list, entries)?;
                self.context()?.respond(cookie, code, runs)?
            }
        };
        self.supplied(supplied)
    }
    fn supplied(&mut self, supplied: Supplied) -> Result<()> {
        let errno = if supplied.pending { crate::protocol::errno::EAGAIN } else { 0 };
        let refusal = Refusal { errno, detail: supplied.first_refused, limit: None };
        let resp = self.head(VIRTIO_GPU_RESP_OK_NODATA, refusal);
        self.put(&SupplyResp {
            resp,
            installed: supplied.installed.into(),
            refused: supplied.refused.into(),
            reserved: 0.into(),
        });
        Ok(())
    }
    fn invalidate(&mut self, request: &[u8]) -> Result<()> {
        let cmd: Invalidate = whole(request)?;
        zero(cmd.reserved.get() == 0)?;
        let (start, length) = (cmd.start.get(), cmd.length.get());
        let range = match cmd.event.get() {
            INVAL_UNMAP | INVAL_CLEAR | INVAL_PROTECT | INVAL_MIGRATE => {
                PageRange::from_bytes(start, length, GUEST_VA_END)?
            }
            INVAL_RELEASE if start == 0 && length == 0 => {
                PageRange { start: 0, end: GUEST_VA_END >> PAGE_SHIFT }
            }
            _ => return Err(Error::Value),
        };
        let seq = self.context()?.invalidate(range);
        let resp = self.ok();
        self.put(&InvalidateResp { resp, seq: seq.into(), reserved: 0.into() });
        Ok(())
    }
    fn submit_3d(&mut self, request: &[u8]) -> Result<()> {
        let (cmd, payload) = with_list::<CmdSubmit, u8>(
            request,
            |cmd| cmd.size.get(),
            u32::try_from(MAX_COMMAND_BYTES).unwrap_or(0),
        )?;
        zero(cmd.padding.get() == 0)?;
        let context = self.context()?;
        let fenced = self.request.flags.get() & VIRTIO_GPU_FLAG_FENCE != 0;
        let area = self.room.saturating_sub(size_of::<SvmResp>());
        let submission = submit::Submission { guest: self.guest, context: &context, fenced };
        // The head says how it went, and is written when that is known.
        self.out.resize(size_of::<SvmResp>(), 0);
        let head = match submission.run(payload, self.out, area)? {
            None => self.ok(),
            Some((index, Refusal { errno, limit, .. })) => {
                let error = Error::At { index, errno, limit };
                self.head(error.response(), error.refusal())
            }
        };
        if head.write_to_prefix(self.out).is_err() {
            unreachable!("the head has its place");
        }
        Ok(())
    }
}

/// Whether a character of a guest's name could do more to a log or a terminal than stand there: controls, and what
/// reorders or hides text around it. These are what Rust escapes, but for quotes.
fn is_unprintable(char: char) -> bool {
    !matches!(char, '"' | '\'' | '\\') && char.escape_debug().len() > 1
}

/// An entry of a blob: its first guest-physical page, and how many.
fn blob_entry(entry: &MemEntry, memory: &MemoryTable) -> Result<(u64, u64)> {
    zero(entry.padding.get() == 0)?;
    let range = PageRange::from_bytes(entry.addr.get(), entry.length.get().into(), u64::MAX)?;
    memory.lookup(range.start, range.pages()).ok_or(Error::NoMemory)?;
    Ok((range.start, range.pages()))
}
