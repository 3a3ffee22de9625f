//! The table of methods: `rpc.discover` prints it and every request goes through it, so the two cannot drift apart.

use super::events::{KINDS, Subscription};
use super::handlers;
use super::params::{Args, Param, Shape};
use super::rpc::{Error, Kind, Request, quote};
use super::{ControlState, discover};
use virtio_gpu_svm::host::RECENT_FAULTS;

/// Faults that `fault.recent` tells unless asked otherwise.
pub const DEFAULT_FAULTS: usize = 64;

/// What a handler leaves for the connection to do once the answer is written.
#[derive(Debug)]
pub enum Then {
    /// Nothing.
    Continue,
    /// Send what this subscription brings, in place of an earlier one.
    Subscribe(Subscription),
    /// End the daemon.
    Shutdown,
}

/// A successful outcome.
#[derive(Debug)]
pub struct Answer {
    /// The text of the result.
    pub result: String,
    /// What follows.
    pub then: Then,
}

/// Carries out a method whose parameters were checked. May wait for the registry, never for a client.
pub type Handler = fn(&ControlState, &Args<'_>) -> Result<Answer, Error>;

/// What a client may do: on which socket it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Look: nothing that the daemon or a guest notices.
    ReadOnly,
    /// Everything.
    Full,
}

/// One method.
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// What a client must at least be allowed.
    pub rights: Rights,
    /// It may wait for a guest or for a folder; others wait for locks of a few lines only.
    pub waits: bool,
    /// What it does, in a sentence or two.
    pub summary: &'static str,
    /// What it takes.
    pub params: &'static [Param],
    /// What it answers.
    pub result: &'static str,
    /// What it may fail with, besides what any request may.
    pub errors: &'static [Kind],
    run: Handler,
}

const GUEST_NAME: Shape = Shape::Text;
const CTX_ID: Shape = Shape::Integer { min: 0, max: u32::MAX as u64 };

/// Every method, by name.
pub const METHODS: &[Method] = &[
    Method {
        name: "context.evict",
        rights: Rights::Full,
        waits: true,
        summary: "Drops the device translations of a context. Its next accesses fault; nothing is lost.",
        params: &[
            Param::required("guest", GUEST_NAME, "the guest's name"),
            Param::required("ctx_id", CTX_ID, "the context's id in that guest"),
            Param::optional("device", Shape::Device, "only on this host device; on all when absent"),
        ],
        result: "{evicted_pages}: pages that had a translation",
        errors: &[Kind::GuestNotFound, Kind::GuestNotConnected, Kind::ContextNotFound, Kind::UnknownDevice],
        run: handlers::context_evict,
    },
    Method {
        name: "context.get",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "One context (a guest process): its address space, its GPU VMs with all mappings, its counters.",
        params: &[
            Param::required("guest", GUEST_NAME, "the guest's name"),
            Param::required("ctx_id", CTX_ID, "the context's id in that guest"),
        ],
        result: "{guest, ctx_id, generation, name, capset_id, known_pages, inval_seq, inval_done_seq, \
                 pending_faults, jobs, limits: [{name, used, limit}], vms: [{vm_id, device, asid, state, error, \
                 resident_pages, mappings: \
                 [{gpu_start, gpu_end, kind, cpu_start, cpu_end, resource_id, offset, readonly}]}], counters}; \
                 ranges are half-open, addresses in bytes",
        errors: &[Kind::GuestNotFound, Kind::GuestNotConnected, Kind::ContextNotFound],
        run: handlers::context_get,
    },
    Method {
        name: "context.list",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "Contexts alive, without their mappings.",
        params: &[Param::optional("guest", GUEST_NAME, "only of this guest; of all when absent")],
        result: "{contexts: [{guest, ctx_id, generation, name, known_pages, resident_pages, \
                 pending_faults, jobs, mappings, table_bytes, vms: [{vm_id, device, asid, state, mappings, \
                 resident_pages}], \
                 counters}]}",
        errors: &[Kind::GuestNotFound],
        run: handlers::context_list,
    },
    Method {
        name: "device.ledger",
        rights: Rights::Full,
        waits: false,
        summary: "For debugging: the faults that a host device says it raised, from below the fault router. \
                  Empty unless the ledger is switched on.",
        params: &[Param::required("device", Shape::Device, "the host device's index or name")],
        result: "{device, name, entries: [{guest, ctx_id, generation, asid, page, access}], overwritten}; page \
                 is a GPU page number, access is read, write or atomic",
        errors: &[Kind::UnknownDevice],
        run: handlers::device_ledger,
    },
    Method {
        name: "device.list",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "The host devices.",
        params: &[],
        result: "{devices: [{device, name, va_bits, engines, fault_model, address_model, gpu_vms, retiring, \
                 faults_raised}]}",
        errors: &[],
        run: handlers::device_list,
    },
    Method {
        name: "events.subscribe",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "From now on sends notifications `event` with {kind, seq, guest, ...} on this connection. A \
                  subscriber that does not keep up loses events and is told by {kind: \"gap\", seq, missed}: \
                  that many up to that seq, of all kinds. Subscribing again replaces the kinds.",
        params: &[Param::optional("kinds", Shape::Words(KINDS), "only these kinds; all when absent")],
        result: "{kinds, last_seq}: what was subscribed to, and the last event before it",
        errors: &[],
        run: handlers::events_subscribe,
    },
    Method {
        name: "fault.recent",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "The last device faults that came to an end, the newest last.",
        params: &[Param::optional(
            "limit",
            Shape::Integer { min: 1, max: RECENT_FAULTS as u64 },
            "at most so many; 64 when absent",
        )],
        result: "{faults: [{time_ns, guest, ctx_id, device, asid, cookie, gpu_addr, cpu_addr, access, outcome, \
                 wait_ns}]}; time_ns counts from the daemon's start, cookie is 0 where the guest was not asked",
        errors: &[],
        run: handlers::fault_recent,
    },
    Method {
        name: "guest.add",
        rights: Rights::Full,
        waits: true,
        summary: "Adds a guest and listens for its VMM on a vhost-user socket (mode 0600). The same guest again \
                  has no effect.",
        params: &[
            Param::required("name", GUEST_NAME, "its name: 1 to 64 of A-Z a-z 0-9 . _ -"),
            Param::required("socket", Shape::Text, "absolute path of the socket, below a runtime folder"),
            Param::optional(
                "devices",
                Shape::TextList,
                "names of the host devices granted, in the order of the guest's dev_id; all when absent",
            ),
            Param::optional(
                "limits",
                Shape::Limits,
                "limits of its own, by name, in place of those of the configuration",
            ),
        ],
        result: "{created}: whether it was not there before",
        errors: &[
            Kind::BadName,
            Kind::NameTaken,
            Kind::SocketOutsideRuntimeDirs,
            Kind::SocketInUse,
            Kind::SocketFailed,
            Kind::UnknownDevice,
            Kind::DeviceTwice,
            Kind::ShuttingDown,
        ],
        run: handlers::guest_add,
    },
    Method {
        name: "guest.get",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "One guest.",
        params: &[Param::required("name", GUEST_NAME, "its name")],
        result: "{name, socket, devices, connected, sessions, last_error, limits: [{name, scope, used, peak, \
                 limit, refused}], fault_deadline_ms, busy_poll_us, log_lines, session_rate: {as a limit}, \
                 status: null or {name, epoch, incarnation, devices, contexts, retiring, resources, \
                 memory_bytes, memory_regions, pending_faults, frozen}, queues: [{failed, failures, turns, \
                 chains, refused, descriptors, most_chains, most_descriptors}]}; used, peak and refused are of the session and 0 without one, \
                 those of log_lines and session_rate of all sessions",
        errors: &[Kind::GuestNotFound],
        run: handlers::guest_get,
    },
    Method {
        name: "guest.list",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "All guests.",
        params: &[],
        result: "{guests: [as guest.get answers]}",
        errors: &[],
        run: handlers::guest_list,
    },
    Method {
        name: "guest.remove",
        rights: Rights::Full,
        waits: true,
        summary: "Removes a guest: ends its session and unlinks its socket. A guest that is not there is no error.",
        params: &[Param::required("name", GUEST_NAME, "its name")],
        result: "{removed}: whether it was there",
        errors: &[],
        run: handlers::guest_remove,
    },
    Method {
        name: "rpc.discover",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "This description, as an OpenRPC document.",
        params: &[],
        result: "an OpenRPC document",
        errors: &[],
        run: discover::run,
    },
    Method {
        name: "server.info",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "The daemon: version, process, devices, protocol.",
        params: &[],
        result: "{name, version, pid, uptime_s, started_unix_s, devices: [name], guests, sandbox, protocol: \
                 {virtio_device_id, version_major, version_minor, capset_id, capset_version}, limits: \
                 {line_bytes, batch, depth}}",
        errors: &[],
        run: handlers::server_info,
    },
    Method {
        name: "shutdown",
        rights: Rights::Full,
        waits: false,
        summary: "Answers, then ends the daemon as SIGTERM does.",
        params: &[],
        result: "{}",
        errors: &[],
        run: handlers::shutdown,
    },
    Method {
        name: "stats.get",
        rights: Rights::ReadOnly,
        waits: false,
        summary: "Counts of the whole host since the daemon started.",
        params: &[],
        result: "{guests, contexts, gpu_vms, pending_vms, peak_pending_vms, counters: {faults_raised, \
                 faults_served_locally, faults_answered, faults_refused, faults_dropped, faults_throttled, \
                 faults_reported, faults_coalesced, answers_stale, runs_installed, runs_refused, invalidations, \
                 jobs_submitted, jobs_done, jobs_failed, jobs_dropped}}",
        errors: &[],
        run: handlers::stats_get,
    },
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// Carries out a request of a client with these rights: finds its method, checks all parameters, and only then does it.
///
/// # Errors
/// [`Kind::UnknownMethod`], [`Kind::ReadOnly`], [`Kind::InvalidParams`], [`Kind::Internal`], and those of the method.
pub fn call(state: &ControlState, rights: Rights, request: &Request) -> Result<Answer, Error> {
    let Some(method) = find(&request.method) else {
        let message = format!("unknown method {}; rpc.discover lists all", quote(&request.method));
        return Err(Error::new(Kind::UnknownMethod, message));
    };
    if method.rights == Rights::Full && rights == Rights::ReadOnly {
        let message =
            format!("{} is not for this socket, which is read-only; use the control socket", method.name);
        return Err(Error::new(Kind::ReadOnly, message));
    }
    let args = Args::check(method.params, &request.params)?;
    (method.run)(state, &args).inspect_err(|error| {
        debug_assert!(
            error.kind == Kind::Internal || method.errors.contains(&error.kind),
            "{} fails with {:?}, which its table does not list",
            method.name,
            error.kind,
        );
    })
}
