//! The operator's door: JSON-RPC 2.0 on a unix stream socket, one message a line.
//!
//! `svmd` makes the sockets, one for everything and perhaps one to look only, and runs [`serve`] for each on its tokio
//! runtime; neither takes anything from the other. The way of a request:
//! connection -> `admission` (whose is it, is there room?) -> line -> [`rpc`] (is it a request?) -> [`methods`] (the table: which method, are its parameters right?) ->
//! `handlers` (the registry and the core do it) -> one line back. [`events`] carries what happens to guests.
//!
//! Invariants: nothing is done before every parameter is checked; no lock of the core is held while a byte is
//! written; a client that does not read is cut off, and one that asks a lot waits between its own requests.

mod admission;
mod answers;
mod discover;
pub mod events;
mod handlers;
mod json;
pub mod methods;
mod params;
pub mod rpc;
mod server;

pub use admission::{Options, Users};
pub use server::{METHOD_THREADS, serve};

use crate::registry::Registry;
use events::Hub;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// What every request may look at.
pub struct ControlState {
    registry: Arc<Registry>,
    hub: Arc<Hub>,
    started: Instant,
    started_unix_s: u64,
    shutdown: Arc<Notify>,
}

impl ControlState {
    /// A daemon that starts now. `shutdown` is notified once `shutdown` was asked for and answered; whoever waits for
    /// it ends the daemon as SIGTERM does.
    pub fn new(registry: Arc<Registry>, shutdown: Arc<Notify>) -> Arc<Self> {
        let hub = Arc::new(Hub::default());
        let publisher = Arc::clone(&hub);
        registry.subscribe(Box::new(move |event| publisher.publish(event)));
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Arc::new(Self {
            registry,
            hub,
            started: Instant::now(),
            started_unix_s: since_epoch.as_secs(),
            shutdown,
        })
    }
}
