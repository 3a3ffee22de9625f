//! The commands of the control queue, typed. Each builds its request and hands it to the rings of [`super`].

use super::super::{Error, Result};
use super::{Posted, Response, SvmDevice};
use virtio_gpu_svm::protocol::control::{
    GetDevice, GetDeviceResp, Hello, HelloResp, Invalidate, InvalidateResp, PageResponse, PageRun,
    SupplyResp, SvmResp, VIRTIO_GPU_CMD_SVM_GET_DEVICE, VIRTIO_GPU_CMD_SVM_HELLO,
    VIRTIO_GPU_CMD_SVM_INVALIDATE, VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
};
use virtio_gpu_svm::protocol::gpu::{
    CmdSubmit, CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY,
    VIRTIO_GPU_CMD_SUBMIT_3D,
};
use virtio_gpu_svm::protocol::pages::Told;
use virtio_gpu_svm::protocol::{
    CAPSET_SVM, MAX_COMMAND_BYTES, MAX_RESPONSE_BYTES, VERSION_MAJOR, VERSION_MINOR,
};
use zerocopy::IntoBytes;

impl SvmDevice {
    /// HELLO. Its answer sets the epoch that later answers are compared with.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn hello(&self, incarnation: u64) -> Result<HelloResp> {
        self.call(hello_request(incarnation).as_bytes(), &[], size_of::<HelloResp>())?.hello()
    }

    /// HELLO, posted.
    ///
    /// # Errors
    /// As [`Self::post`].
    pub fn post_hello(&self, token: u64, incarnation: u64) -> Result<()> {
        self.post(token, hello_request(incarnation).as_bytes().to_vec(), size_of::<HelloResp>())
    }

    /// Describes a host device.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_device(&self, dev_id: u32) -> Result<GetDeviceResp> {
        let hdr = header(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
        let request = GetDevice { hdr, dev_id: dev_id.into(), reserved: 0.into() };
        let response = self.call(request.as_bytes(), &[], size_of::<GetDeviceResp>())?;
        if response.status() != 0 {
            return Ok(GetDeviceResp { resp: response.head, ..GetDeviceResp::default() });
        }
        response.parse(VIRTIO_GPU_CMD_SVM_GET_DEVICE)
    }

    /// Asks for a description of a host device, posted.
    ///
    /// # Errors
    /// As [`Self::post`].
    pub fn post_get_device(&self, token: u64, dev_id: u32) -> Result<()> {
        let hdr = header(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
        let request = GetDevice { hdr, dev_id: dev_id.into(), reserved: 0.into() };
        self.post(token, request.as_bytes().to_vec(), size_of::<GetDeviceResp>())
    }

    /// Creates a context of this protocol's capset. Its commands take turns with those of other lines: a user's contexts
    /// have one line.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn ctx_create(&self, ctx_id: u32, line: u32, name: &str) -> Result<Response> {
        self.begin(ctx_id, line);
        let mut request =
            CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        request.context_init = CAPSET_SVM.into();
        let mut nlen = 0u32;
        for (to, from) in request.debug_name.iter_mut().zip(name.bytes()) {
            *to = from;
            nlen += 1;
        }
        request.nlen = nlen.into();
        self.call(request.as_bytes(), &[], size_of::<SvmResp>())
    }

    /// Destroys a context. A CONTEXT_RETIRED record follows when no engine can use anything of it.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn ctx_destroy(&self, ctx_id: u32) -> Result<Response> {
        self.call(header(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes(), &[], size_of::<SvmResp>())
    }

    /// Passes a process' requests on. The reply area of `reply_len` bytes is the answer's tail.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn submit_3d(&self, ctx_id: u32, payload: &[u8], reply_len: usize) -> Result<Response> {
        let response = size_of::<SvmResp>().saturating_add(reply_len);
        let too_large = Error::TooLarge { request: payload.len(), response };
        if response > MAX_RESPONSE_BYTES || payload.len() > MAX_COMMAND_BYTES - size_of::<CmdSubmit>() {
            return Err(too_large);
        }
        let size = u32::try_from(payload.len()).map_err(|_| too_large)?;
        let hdr = header(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
        let request = CmdSubmit { hdr, size: size.into(), padding: 0.into() };
        self.call(request.as_bytes(), payload, response)
    }

    /// The answer to a fault, to be posted under `token`.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn page_response(
        token: u64,
        (ctx_id, cookie): (u32, u64),
        code: u32,
        runs: &[PageRun],
    ) -> Result<Posted> {
        let hdr = header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id);
        let Told { num_runs, flags, bytes } = told(runs)?;
        let head = PageResponse { hdr, cookie: cookie.into(), code: code.into(), num_runs, flags };
        let request = [head.as_bytes(), &bytes].concat();
        Ok(Posted { token, request, response_len: size_of::<SupplyResp>() })
    }

    /// Withdraws a range of a context. The answer says that no new use begins; [`Self::wait_done`] with its sequence
    /// says that old uses have ended.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn invalidate(&self, ctx_id: u32, start: u64, length: u64, event: u32) -> Result<InvalidateResp> {
        let hdr = header(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id);
        let range = (start.into(), length.into());
        let request =
            Invalidate { hdr, start: range.0, length: range.1, event: event.into(), reserved: 0.into() };
        let response = self.call(request.as_bytes(), &[], size_of::<InvalidateResp>())?;
        if response.status() != 0 {
            return Ok(InvalidateResp { resp: response.head, ..InvalidateResp::default() });
        }
        response.parse(VIRTIO_GPU_CMD_SVM_INVALIDATE)
    }
}

fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

fn hello_request(incarnation: u64) -> Hello {
    let version = u32::from(VERSION_MAJOR) << 16 | u32::from(VERSION_MINOR);
    let hdr = header(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    Hello { hdr, incarnation: incarnation.into(), version: version.into(), reserved: 0.into() }
}

fn told(runs: &[PageRun]) -> Result<Told> {
    Told::new(runs).ok_or(Error::TooLarge { request: size_of_val(runs), response: 0 })
}
