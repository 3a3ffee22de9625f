//! Which commands are done within microseconds whatever they hold: answers before them may wait for theirs.

use crate::mock::{A, GPA, hdr, run};
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::*;
use zerocopy::IntoBytes;

fn submit(requests: &[u32]) -> Vec<u8> {
    let request = |cmd: &u32| {
        let len = size_of::<VmRef>() as u32;
        let hdr = ReqHdr { cmd: (*cmd).into(), len: len.into(), ..ReqHdr::default() };
        VmRef { hdr, vm_id: 1.into(), ..VmRef::default() }.as_bytes().to_vec()
    };
    let payload: Vec<u8> = requests.iter().flat_map(request).collect();
    let size = (payload.len() as u32).into();
    let head = CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, 1), size, ..CmdSubmit::default() };
    [head.as_bytes(), &payload].concat()
}

fn answer(runs: &[PageRun]) -> Vec<u8> {
    let (hdr, num_runs) = (hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, 1), (runs.len() as u16).into());
    let head = PageResponse { hdr, num_runs, ..PageResponse::default() };
    [head.as_bytes(), runs.as_bytes()].concat()
}

#[test]
fn what_asks_launches_and_answers_with_few_pages_is_brief() {
    let capset = hdr(VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0);
    let brief = [
        GetCapsetInfo { hdr: capset, ..GetCapsetInfo::default() }.as_bytes().to_vec(),
        submit(&[SVM_REQ_EXEC]),
        submit(&[SVM_REQ_VM_GET_PROPERTY, SVM_REQ_EXEC]),
        answer(&[run(A, GPA, 64, 0)]),
        answer(&[]),
        b"too short".to_vec(),
    ];
    for (index, command) in brief.iter().enumerate() {
        assert!(Guest::is_brief(command), "{index}");
    }
}

#[test]
fn what_takes_as_long_as_there_is_much_is_not() {
    let invalidate = hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, 1);
    let long = [
        Invalidate { hdr: invalidate, ..Invalidate::default() }.as_bytes().to_vec(),
        hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 1).as_bytes().to_vec(),
        hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1).as_bytes().to_vec(),
        hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0).as_bytes().to_vec(),
        hdr(0x7777, 0).as_bytes().to_vec(),
        submit(&[SVM_REQ_VM_BIND]),
        submit(&[SVM_REQ_EXEC, SVM_REQ_VM_DESTROY]),
        submit(&[SVM_REQ_EXEC; 20]),
        answer(&[run(A, GPA, 1, 0), run(A, GPA, 65, 0)]),
        answer(&[run(A, GPA, 1, 0); 8]),
    ];
    for (index, command) in long.iter().enumerate() {
        assert!(!Guest::is_brief(command), "{index}");
    }
}
