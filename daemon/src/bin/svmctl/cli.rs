//! The command line, and which method each command calls.

use crate::Params;
use crate::client::Error;
use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Where svmd listens unless it is told otherwise.
const DEFAULT_SOCKET: &str = "/run/svmd/control.sock";

/// Look at and steer a running svmd.
///
/// Exit status: 0 done, 1 the daemon refused (the kind of error stands in brackets), 2 the command line is wrong, 3 the
/// daemon cannot be reached.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// Control socket of the daemon. Without it: $SVMD_SOCKET, else /run/svmd/control.sock
    #[arg(long, global = true, value_name = "PATH", default_value_os_t = default_socket(), hide_default_value = true)]
    pub socket: PathBuf,
    /// Print the daemon's result as JSON on one line in place of a table
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

fn default_socket() -> PathBuf {
    std::env::var_os("SVMD_SOCKET").map_or_else(|| PathBuf::from(DEFAULT_SOCKET), PathBuf::from)
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell version, process, protocol and devices of the daemon
    Info,
    /// List the host devices: engines, address bits, GPU VMs, faults raised
    Devices,
    /// List the guests: their sockets, whether a VMM is connected, memory, contexts, faults that wait
    Guests,
    /// Add, remove or show a guest
    #[command(subcommand)]
    Guest(GuestCommand),
    /// List the contexts (guest processes): pages known and resident, GPU VMs, faults, jobs
    Contexts {
        /// Only those of this guest
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,
    },
    /// Show or evict a context
    #[command(subcommand)]
    Context(ContextCommand),
    /// List the last device faults that came to an end, the newest last
    Faults {
        /// At most so many, 1 to 1024
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=virtio_gpu_svm::host::RECENT_FAULTS as u64))]
        limit: u64,
    },
    /// Print the counts of the whole host since the daemon started
    Stats,
    /// Print what happens to guests, one line each, until the daemon ends
    ///
    /// A line "gap" says that svmctl was too slow and how many events it missed.
    Events {
        /// Only this kind (repeatable): guest.added, guest.removed, guest.connected, guest.disconnected
        #[arg(long = "kind", value_name = "KIND")]
        kinds: Vec<String>,
    },
    /// For debugging: list the faults that a host device itself says it raised
    ///
    /// This is the device's record from below the fault router, to compare with what guests were told. It is empty
    /// unless svmd was started with the ledger on.
    Ledger {
        /// Index or name of the device
        device: String,
    },
    /// Describe the methods of the control socket; with --json as an OpenRPC document
    Discover,
    /// End the daemon, as SIGTERM does: sessions end, sockets are removed
    Shutdown,
    /// Call a method by name and print its result as JSON
    Raw {
        /// The method, for instance guest.get
        method: String,
        /// Its parameters, a JSON object, for instance '{"name":"vm0"}'
        #[arg(value_name = "JSON")]
        params: Option<String>,
    },
}

/// Commands about one guest.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Add a guest and listen for its VMM; the same guest again has no effect
    Add {
        /// Its name: 1 to 64 of A-Z a-z 0-9 . _ -
        name: String,
        /// Path of its vhost-user socket, below a runtime folder of the daemon
        // Not called `socket`: clap would take it for the global option of that name.
        #[arg(value_name = "SOCKET")]
        guest_socket: String,
        /// Grant this host device (repeatable, in the order in which the guest shall see them); all when absent
        #[arg(long = "device", value_name = "NAME")]
        devices: Vec<String>,
        /// A limit of its own in place of the configuration's, for instance total_mappings=1024 (repeatable); guest show
        /// lists the names
        #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = limit)]
        limits: Vec<(String, u64)>,
    },
    /// Remove a guest: end its session and remove its socket; a guest that is not there is no error
    Remove {
        /// Its name
        name: String,
    },
    /// Show a guest
    Show {
        /// Its name
        name: String,
    },
}

/// Commands about one context.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// Show a context: its mappings A..B -> C..D on each device, resident pages, counters
    Show {
        /// The guest's name
        guest: String,
        /// The context's id in that guest
        ctx: u32,
    },
    /// Drop the device translations of a context; its next accesses fault, nothing is lost
    Evict {
        /// The guest's name
        guest: String,
        /// The context's id in that guest
        ctx: u32,
        /// Only on this host device, by index or name; on all when absent
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
    },
}

impl Command {
    /// The method and its parameters.
    pub fn request(&self) -> Result<(String, Params), Error> {
        let (method, params) = match self {
            Self::Info => ("server.info", json!({})),
            Self::Devices => ("device.list", json!({})),
            Self::Guests => ("guest.list", json!({})),
            Self::Guest(GuestCommand::Add { name, guest_socket, devices, limits }) => {
                let devices = (!devices.is_empty()).then_some(devices);
                let by_name: Params =
                    limits.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
                let limits = (!limits.is_empty()).then_some(by_name);
                let socket = absolute(guest_socket)?;
                let params = json!({ "name": name, "socket": socket, "devices": devices, "limits": limits });
                ("guest.add", params)
            }
            Self::Guest(GuestCommand::Remove { name }) => ("guest.remove", json!({ "name": name })),
            Self::Guest(GuestCommand::Show { name }) => ("guest.get", json!({ "name": name })),
            Self::Contexts { guest } => ("context.list", json!({ "guest": guest })),
            Self::Context(ContextCommand::Show { guest, ctx }) => {
                ("context.get", json!({ "guest": guest, "ctx_id": ctx }))
            }
            Self::Context(ContextCommand::Evict { guest, ctx, device: on }) => {
                let on = on.as_deref().map(device);
                ("context.evict", json!({ "guest": guest, "ctx_id": ctx, "device": on }))
            }
            Self::Faults { limit } => ("fault.recent", json!({ "limit": limit })),
            Self::Stats => ("stats.get", json!({})),
            Self::Events { kinds } => {
                let kinds = (!kinds.is_empty()).then_some(kinds);
                ("events.subscribe", json!({ "kinds": kinds }))
            }
            Self::Ledger { device: name } => ("device.ledger", json!({ "device": device(name) })),
            Self::Discover => ("rpc.discover", json!({})),
            Self::Shutdown => ("shutdown", json!({})),
            Self::Raw { method, params } => {
                return Ok((method.clone(), raw_params(params.as_deref().unwrap_or("{}"))?));
            }
        };
        Ok((method.to_owned(), given(params)))
    }
}

/// The path as the daemon must be told it, whose own folder is another one.
fn absolute(path: &str) -> Result<String, Error> {
    let absolute =
        std::path::absolute(path).map_err(|error| Error::Usage(format!("socket {path:?}: {error}")))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|_| Error::Usage("the current folder is not UTF-8".to_owned()))
}

/// A limit and its number.
fn limit(text: &str) -> Result<(String, u64), String> {
    let Some((name, value)) = text.split_once('=') else { return Err("write NAME=VALUE".to_owned()) };
    let value = value.parse().map_err(|error| format!("{value:?} is no number: {error}"))?;
    Ok((name.to_owned(), value))
}

/// A number means an index, anything else a name.
fn device(text: &str) -> Value {
    text.parse::<u64>().map_or_else(|_| json!(text), |index| json!(index))
}

/// The parameters without those that were not given.
fn given(params: Value) -> Params {
    match params {
        Value::Object(params) => params.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Map::new(),
    }
}

fn raw_params(text: &str) -> Result<Params, Error> {
    match serde_json::from_str(text) {
        Ok(Value::Object(params)) => Ok(params),
        Ok(_) => Err(Error::Usage("the parameters are no JSON object; write '{\"NAME\": VALUE}'".to_owned())),
        Err(error) => Err(Error::Usage(format!("the parameters are no JSON: {error}"))),
    }
}
