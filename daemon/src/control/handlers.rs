//! The methods' bodies: from checked parameters to the registry or the core, and back to the text of a result.
//!
//! Called by [`super::methods::call`] on a blocking thread. Snapshots are taken first and turned into text afterwards,
//! with no lock held.

use super::answers::{Ledger, LedgerRow, Limits, Protocol, ServerInfo};
use super::events::KINDS;
use super::json::MAX_DEPTH;
use super::methods::{Answer, DEFAULT_FAULTS, Then};
use super::params::Args;
use super::rpc::{Error, Kind, MAX_BATCH, quote, result_text};
use super::{ControlState, server};
use crate::registry::{AddError, Endpoint, GuestEntry, GuestSpec};
use crate::sandbox;
use serde::Serialize;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::info::ContextSummary;
use virtio_gpu_svm::protocol;

type Outcome = Result<Answer, Error>;

fn answer(result: &impl Serialize) -> Outcome {
    Ok(Answer { result: result_text(result)?, then: Then::Continue })
}

pub(super) fn server_info(state: &ControlState, _: &Args<'_>) -> Outcome {
    answer(&ServerInfo {
        name: "svmd",
        version: env!("CARGO_PKG_VERSION"),
        pid: std::process::id(),
        uptime_s: state.started.elapsed().as_secs(),
        started_unix_s: state.started_unix_s,
        devices: state.registry.host().devices().into_iter().map(|device| device.name).collect(),
        guests: state.registry.list().len(),
        sandbox: sandbox::in_force(),
        protocol: Protocol {
            virtio_device_id: protocol::VIRTIO_ID_GPU,
            version_major: protocol::VERSION_MAJOR,
            version_minor: protocol::VERSION_MINOR,
            capset_id: protocol::CAPSET_SVM,
            capset_version: protocol::CAPSET_SVM_VERSION,
        },
        limits: Limits { line_bytes: server::MAX_LINE, batch: MAX_BATCH, depth: MAX_DEPTH },
    })
}

pub(super) fn device_list(state: &ControlState, _: &Args<'_>) -> Outcome {
    answer(&json!({ "devices": state.registry.host().devices() }))
}

pub(super) fn device_ledger(state: &ControlState, args: &Args<'_>) -> Outcome {
    let index = Args::must(device_index(state, args)?)?;
    let host = state.registry.host();
    let device = host.device(index).ok_or_else(|| unknown_device(&index.to_string()))?;
    let (entries, overwritten) = device.ledger();
    answer(&Ledger {
        device: index,
        name: device.info().name.clone(),
        entries: entries.iter().map(LedgerRow::from).collect(),
        overwritten,
    })
}

pub(super) fn guest_add(state: &ControlState, args: &Args<'_>) -> Outcome {
    let spec = GuestSpec {
        name: Args::must(args.text("name"))?.to_owned(),
        socket: Endpoint::Path(PathBuf::from(Args::must(args.text("socket"))?)),
        devices: args.texts("devices").map(|names| names.into_iter().map(str::to_owned).collect()),
        limits: args.limits("limits"),
    };
    let created = state.registry.add(spec).map_err(|error| add_error(&error))?;
    answer(&json!({ "created": created }))
}

pub(super) fn guest_list(state: &ControlState, _: &Args<'_>) -> Outcome {
    answer(&json!({ "guests": state.registry.list() }))
}

pub(super) fn guest_get(state: &ControlState, args: &Args<'_>) -> Outcome {
    answer(&guest_entry(state, Args::must(args.text("name"))?)?)
}

pub(super) fn guest_remove(state: &ControlState, args: &Args<'_>) -> Outcome {
    let removed = state.registry.remove(Args::must(args.text("name"))?);
    answer(&json!({ "removed": removed }))
}

pub(super) fn context_list(state: &ControlState, args: &Args<'_>) -> Outcome {
    let guests: Vec<Arc<Guest>> = match args.text("guest") {
        None => state.registry.host().guests(),
        Some(name) => {
            guest_entry(state, name)?;
            // A guest without a VMM has no contexts.
            core_guest(state, name).into_iter().collect()
        }
    };
    let contexts: Vec<ContextSummary> = guests.iter().flat_map(|guest| guest.context_summaries()).collect();
    answer(&json!({ "contexts": contexts }))
}

pub(super) fn context_get(state: &ControlState, args: &Args<'_>) -> Outcome {
    let guest = connected_guest(state, Args::must(args.text("guest"))?)?;
    let ctx_id: u32 = Args::must(args.integer("ctx_id"))?;
    let context = guest.context(ctx_id).map_err(|_| no_context(&guest, ctx_id))?;
    answer(&context.status())
}

pub(super) fn context_evict(state: &ControlState, args: &Args<'_>) -> Outcome {
    let guest = connected_guest(state, Args::must(args.text("guest"))?)?;
    let ctx_id = Args::must(args.integer("ctx_id"))?;
    let device = device_index(state, args)?;
    let pages = guest.evict(ctx_id, device).map_err(|_| no_context(&guest, ctx_id))?;
    answer(&json!({ "evicted_pages": pages }))
}

pub(super) fn fault_recent(state: &ControlState, args: &Args<'_>) -> Outcome {
    let limit = args.integer("limit").unwrap_or(DEFAULT_FAULTS);
    answer(&json!({ "faults": state.registry.host().recent_faults(limit) }))
}

pub(super) fn stats_get(state: &ControlState, _: &Args<'_>) -> Outcome {
    answer(&state.registry.host().stats())
}

pub(super) fn events_subscribe(state: &ControlState, args: &Args<'_>) -> Outcome {
    let kinds: Option<Vec<String>> =
        args.texts("kinds").map(|kinds| kinds.into_iter().map(str::to_owned).collect());
    let told = kinds.clone().unwrap_or_else(|| KINDS.iter().map(|kind| (*kind).to_owned()).collect());
    let subscription = state.hub.subscribe(kinds);
    let result = result_text(&json!({ "kinds": told, "last_seq": subscription.last_seq() }))?;
    Ok(Answer { result, then: Then::Subscribe(subscription) })
}

pub(super) fn shutdown(_: &ControlState, _: &Args<'_>) -> Outcome {
    Ok(Answer { result: "{}".to_owned(), then: Then::Shutdown })
}

/// The index that parameter `device` means, if it is given.
fn device_index(state: &ControlState, args: &Args<'_>) -> Result<Option<usize>, Error> {
    let devices = state.registry.host().devices();
    if let Some(name) = args.text("device") {
        let found = devices.iter().find(|device| device.name == name);
        return found.map(|device| Some(device.device)).ok_or_else(|| unknown_device(&quote(name)));
    }
    let Some(index) = args.integer::<u64>("device") else {
        return Ok(None);
    };
    let known =
        usize::try_from(index).ok().filter(|index| devices.iter().any(|device| device.device == *index));
    known.map(Some).ok_or_else(|| unknown_device(&index.to_string()))
}

fn guest_entry(state: &ControlState, name: &str) -> Result<GuestEntry, Error> {
    state.registry.get(name).ok_or_else(|| {
        Error::new(Kind::GuestNotFound, format!("no guest {}; guest.list tells all names", quote(name)))
    })
}

/// The core's guest of that name, while a VMM is connected.
fn core_guest(state: &ControlState, name: &str) -> Option<Arc<Guest>> {
    state.registry.host().guests().into_iter().find(|guest| guest.name() == name)
}

fn connected_guest(state: &ControlState, name: &str) -> Result<Arc<Guest>, Error> {
    let entry = guest_entry(state, name)?;
    core_guest(state, name).ok_or_else(|| {
        let message = format!(
            "guest {} has no VMM connected, so it has no contexts; connect one to {}",
            quote(name),
            entry.socket
        );
        Error::new(Kind::GuestNotConnected, message)
    })
}

/// All that a lookup by id can fail with.
fn no_context(guest: &Guest, ctx_id: u32) -> Error {
    let message =
        format!("no context {ctx_id} in guest {}; context.list tells those alive", quote(guest.name()));
    Error::new(Kind::ContextNotFound, message)
}

fn unknown_device(device: &str) -> Error {
    Error::new(Kind::UnknownDevice, format!("no host device {device}; device.list tells indices and names"))
}

fn add_error(error: &AddError) -> Error {
    let (kind, advice) = match error {
        AddError::BadName(_) => (Kind::BadName, "choose another name"),
        AddError::NameTaken { .. } => (Kind::NameTaken, "choose another name or remove that guest first"),
        AddError::SocketOutsideRuntimeDirs(_) => {
            (Kind::SocketOutsideRuntimeDirs, "choose a path below one, or start svmd with that folder")
        }
        AddError::SocketInUse(_) => (Kind::SocketInUse, "choose another path or end what uses it"),
        AddError::UnknownDevice(_) => (Kind::UnknownDevice, "device.list tells the names"),
        AddError::DeviceTwice(_) => (Kind::DeviceTwice, "name each device once"),
        AddError::ShuttingDown => (Kind::ShuttingDown, "try again once it runs again"),
        AddError::Io { .. } => (
            Kind::SocketFailed,
            "see that its folder is there and writable for svmd, and that the path is below 108 bytes",
        ),
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        message.push_str(": ");
        message.push_str(&source.to_string());
        cause = source.source();
    }
    Error::new(kind, format!("{message}; {advice}"))
}
