//! What happens to guests, told to whoever subscribed.
//!
//! The registry's threads call [`Hub::publish`], which never waits: a bounded ring holds the last events, and a
//! subscriber that falls behind it loses the oldest ones and is told how many by a `gap`.

use super::rpc::notification;
use crate::registry::RegistryEvent;
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

/// Events that wait for the slowest subscriber at most.
const CAPACITY: usize = 256;
/// What may be subscribed to.
pub const KINDS: &[&str] = &["guest.added", "guest.removed", "guest.connected", "guest.disconnected"];
/// The kind that tells of lost events. Always sent.
pub const GAP: &str = "gap";

#[derive(Clone, Debug)]
struct Event {
    seq: u64,
    kind: &'static str,
    params: Value,
}

/// Numbers events and hands them to all subscribers.
pub struct Hub {
    /// The last sequence number given out. Held while sending, so that events are queued in the order of their
    /// numbers; sending does not wait.
    last_seq: Mutex<u64>,
    sender: broadcast::Sender<Event>,
}

impl Default for Hub {
    fn default() -> Self {
        Self { last_seq: Mutex::new(0), sender: broadcast::Sender::new(CAPACITY) }
    }
}

impl Hub {
    /// Tells all subscribers. Callable from any thread; does not wait.
    pub fn publish(&self, event: &RegistryEvent) {
        let (kind, mut params) = match event {
            RegistryEvent::GuestAdded { name } => ("guest.added", json!({ "guest": name })),
            RegistryEvent::GuestRemoved { name } => ("guest.removed", json!({ "guest": name })),
            RegistryEvent::GuestConnected { name } => ("guest.connected", json!({ "guest": name })),
            RegistryEvent::GuestDisconnected { name, reason } => {
                ("guest.disconnected", json!({ "guest": name, "reason": reason }))
            }
        };
        // A number is whole whatever happened to the thread that held the lock.
        let mut last_seq = self.last_seq.lock().unwrap_or_else(PoisonError::into_inner);
        *last_seq = last_seq.saturating_add(1);
        params["kind"] = json!(kind);
        params["seq"] = json!(*last_seq);
        // Fails only when nobody has subscribed.
        self.sender.send(Event { seq: *last_seq, kind, params }).ok();
    }

    /// Everything of these kinds from now on; of every kind if none is named.
    pub fn subscribe(&self, kinds: Option<Vec<String>>) -> Subscription {
        let last_seq = self.last_seq.lock().unwrap_or_else(PoisonError::into_inner);
        Subscription { receiver: self.sender.subscribe(), kinds, last_seq: *last_seq }
    }
}

/// One subscriber's place in the sequence of events.
#[derive(Debug)]
pub struct Subscription {
    receiver: broadcast::Receiver<Event>,
    kinds: Option<Vec<String>>,
    last_seq: u64,
}

impl Subscription {
    /// The last event before this subscription.
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// The text of the next notification; `None` once there will be no more. May be dropped while it waits without
    /// losing an event.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            match self.receiver.recv().await {
                Ok(event) => {
                    self.last_seq = event.seq;
                    if self.wants(event.kind) {
                        return Some(notification("event", &event.params));
                    }
                }
                Err(RecvError::Lagged(missed)) => {
                    self.last_seq = self.last_seq.saturating_add(missed);
                    let params = json!({ "kind": GAP, "seq": self.last_seq, "missed": missed });
                    return Some(notification("event", &params));
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn wants(&self, kind: &str) -> bool {
        self.kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(name: &str) -> RegistryEvent {
        RegistryEvent::GuestAdded { name: name.into() }
    }
    async fn next(subscription: &mut Subscription) -> Value {
        let text = subscription.next().await.unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["params"].clone()
    }

    #[tokio::test]
    async fn subscriber_sees_its_kinds_in_order() {
        let hub = Hub::default();
        hub.publish(&added("before"));
        let mut subscription = hub.subscribe(Some(vec!["guest.removed".into()]));
        hub.publish(&added("a"));
        hub.publish(&RegistryEvent::GuestRemoved { name: "a".into() });
        assert_eq!(subscription.last_seq(), 1);
        let seen = next(&mut subscription).await;
        assert_eq!(seen, json!({"kind": "guest.removed", "seq": 3, "guest": "a"}));
    }

    #[tokio::test]
    async fn slow_subscriber_is_told_of_the_gap() {
        let hub = Hub::default();
        let mut subscription = hub.subscribe(None);
        for _ in 0..CAPACITY + 5 {
            hub.publish(&added("a"));
        }
        assert_eq!(next(&mut subscription).await, json!({"kind": GAP, "seq": 5, "missed": 5}));
        assert_eq!(next(&mut subscription).await["seq"], 6);
    }
}
