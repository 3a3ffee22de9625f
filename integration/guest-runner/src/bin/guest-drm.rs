//! Looks at a virtio-gpu through the stock Linux driver, as an unprivileged process does: opens the render node, reads
//! parameters and a capset, makes a context of that capset and a blob resource in guest memory.
//!
//! `guest-drm NODE CAPSET_ID CAPSET_BYTES` prints one line of JSON: what the driver said, the capset in hex.

#![expect(unsafe_code, reason = "calls of the kernel's DRM interface")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use serde_json::json;

/// DRM's letter among ioctls.
const DRM: u8 = b'd';
const GETPARAM: Opcode = opcode::read_write::<GetParam>(DRM, 0x43);
const GET_CAPS: Opcode = opcode::read_write::<GetCaps>(DRM, 0x49);
const CREATE_BLOB: Opcode = opcode::read_write::<CreateBlob>(DRM, 0x4a);
const CONTEXT_INIT: Opcode = opcode::read_write::<ContextInit>(DRM, 0x4b);

/// `VIRTGPU_PARAM_*`.
const PARAMETERS: [(&str, u64); 4] =
    [("3d_features", 1), ("resource_blob", 3), ("context_init", 6), ("supported_capset_ids", 7)];
const CONTEXT_PARAM_CAPSET_ID: u64 = 1;
const BLOB_MEM_GUEST: u32 = 1;
const BLOB_FLAG_USE_MAPPABLE: u32 = 1;
const BLOB_BYTES: u64 = 256 << 10;

#[repr(C)]
struct GetParam {
    param: u64,
    value: u64,
}

#[repr(C)]
struct GetCaps {
    cap_set_id: u32,
    cap_set_ver: u32,
    addr: u64,
    size: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct CreateBlob {
    blob_mem: u32,
    blob_flags: u32,
    bo_handle: u32,
    res_handle: u32,
    size: u64,
    pad: u32,
    cmd_size: u32,
    cmd: u64,
    blob_id: u64,
}

#[repr(C)]
struct ContextParam {
    param: u64,
    value: u64,
}

#[repr(C)]
struct ContextInit {
    num_params: u32,
    pad: u32,
    ctx_set_params: u64,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [node, capset_id, capset_bytes] => look(node, capset_id, capset_bytes),
        _ => Err(io::Error::other("usage: guest-drm NODE CAPSET_ID CAPSET_BYTES")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-drm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn look(node: &str, capset_id: &str, capset_bytes: &str) -> io::Result<()> {
    let capset_id: u32 = capset_id.parse().map_err(io::Error::other)?;
    let capset_bytes: usize = capset_bytes.parse().map_err(io::Error::other)?;
    let node = OpenOptions::new().read(true).write(true).open(node).map_err(|error| step("open", error))?;
    let mut parameters = serde_json::Map::new();
    for (name, number) in PARAMETERS {
        parameters.insert(name.to_owned(), get_param(&node, number)?.into());
    }
    let capset = get_caps(&node, capset_id, capset_bytes)?;
    let hex: String = capset.iter().map(|byte| format!("{byte:02x}")).collect();
    init_context(&node, capset_id)?;
    let resource_id = create_blob(&node)?;
    println!("{}", json!({"parameters": parameters, "capset": hex, "resource_id": resource_id}));
    Ok(())
}

fn get_param(node: &File, param: u64) -> io::Result<u32> {
    let mut value = 0u32;
    let mut argument = GetParam { param, value: (&raw mut value).expose_provenance() as u64 };
    // SAFETY: the number belongs to this struct, and `value` names a 32-bit integer that lives until the call is over.
    unsafe { call::<GETPARAM, _>(node, &mut argument) }.map_err(|error| step("GETPARAM", error))?;
    Ok(value)
}

fn get_caps(node: &File, cap_set_id: u32, bytes: usize) -> io::Result<Vec<u8>> {
    let mut capset = vec![0u8; bytes];
    let size = u32::try_from(bytes).map_err(io::Error::other)?;
    let addr = capset.as_mut_ptr().expose_provenance() as u64;
    let mut argument = GetCaps { cap_set_id, cap_set_ver: 1, addr, size, pad: 0 };
    // SAFETY: the number belongs to this struct, and `addr` names `size` bytes that live until the call is over.
    unsafe { call::<GET_CAPS, _>(node, &mut argument) }.map_err(|error| step("GET_CAPS", error))?;
    Ok(capset)
}

fn init_context(node: &File, capset_id: u32) -> io::Result<()> {
    let mut parameters = [ContextParam { param: CONTEXT_PARAM_CAPSET_ID, value: capset_id.into() }];
    let ctx_set_params = parameters.as_mut_ptr().expose_provenance() as u64;
    let mut argument = ContextInit { num_params: 1, pad: 0, ctx_set_params };
    // SAFETY: the number belongs to this struct, and `ctx_set_params` names one parameter that lives until the call is
    // over.
    unsafe { call::<CONTEXT_INIT, _>(node, &mut argument) }.map_err(|error| step("CONTEXT_INIT", error))
}

fn create_blob(node: &File) -> io::Result<u32> {
    let mut argument = CreateBlob {
        blob_mem: BLOB_MEM_GUEST,
        blob_flags: BLOB_FLAG_USE_MAPPABLE,
        size: BLOB_BYTES,
        ..CreateBlob::default()
    };
    // SAFETY: the number belongs to this struct, which names no other memory.
    unsafe { call::<CREATE_BLOB, _>(node, &mut argument) }.map_err(|error| step("CREATE_BLOB", error))?;
    Ok(argument.res_handle)
}

/// # Safety
/// `OPCODE` takes a `T`, and memory that `argument` names may be written by the kernel.
unsafe fn call<const OPCODE: Opcode, T>(fd: impl AsFd, argument: &mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for number and type.
    let updater = unsafe { Updater::<OPCODE, T>::new(argument) };
    // SAFETY: the caller vouches for the memory that the argument names.
    Ok(unsafe { ioctl(fd, updater) }?)
}

fn step(name: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}
