//! Lives of a guest's drivers, from HELLO to the end of the session, and its rings that stop and start between.
//!
//! Called from the guest's own threads; a panic of any thread that worked for it leads to [`Guest::abandon`]. What a life
//! leaves behind retires in its own time, which [`super::engines`] waits for.

use super::records::Outbox;
use super::{Farewell, Guest};
use crate::context::Context;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// How long a device may take to retire what a panic has left behind; engines need a slice.
const GRACE: Duration = Duration::from_secs(1);

/// What a HELLO found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Contexts of earlier incarnations that engines may still use.
    pub retiring: u32,
    /// Host devices of this guest.
    pub num_devices: u32,
}

impl Guest {
    /// Opens a driver's life: contexts and resources of an earlier incarnation are dropped, and what is left runs if it
    /// was frozen. PROTOCOL 4.1.
    pub(crate) fn hello(self: &Arc<Self>, incarnation: u64) -> Greeting {
        if self.lock().incarnation != incarnation {
            self.drop_everything();
        }
        if self.is_frozen() {
            self.thaw();
        }
        let mut inner = self.lock();
        inner.incarnation = incarnation;
        let retiring = inner.retiring_of_earlier();
        inner.quiet_due = retiring > 0;
        let retiring = u32::try_from(retiring).unwrap_or(u32::MAX);
        Greeting { retiring, num_devices: self.num_devices() }
    }

    /// The rings stopped: stops this guest's jobs; on return no engine touches its memory. Until [`Guest::thaw`],
    /// [`Guest::reset`] or a HELLO no other command may be carried out.
    pub fn freeze(&self) {
        let contexts: Vec<Arc<Context>> = {
            let mut inner = self.lock();
            inner.frozen = true;
            self.clock.stop();
            inner.contexts.values().cloned().collect()
        };
        let flushes = contexts.iter().flat_map(|context| context.set_frozen(true)).collect();
        self.wait_flushed(flushes);
        self.wait_retired(&contexts);
    }
    /// The rings run again with the driver that left them.
    pub fn thaw(&self) {
        let contexts: Vec<Arc<Context>> = {
            let mut inner = self.lock();
            inner.frozen = false;
            self.clock.start();
            inner.contexts.values().cloned().collect()
        };
        for context in contexts {
            context.set_frozen(false);
        }
        self.port.ready();
    }
    /// The rings run again from nothing: the driver began anew; drops every context and resource.
    pub fn reset(self: &Arc<Self>) {
        self.drop_everything();
        let mut inner = self.lock();
        inner.incarnation = 0;
        inner.frozen = false;
        self.clock.start();
    }
    /// The session ended: as [`Guest::reset`], and the guest leaves the host's list. On return no engine touches its
    /// memory. A panic in this is the caller's to catch; [`Guest::abandon`] is left then.
    pub fn close(self: &Arc<Self>) {
        self.reset();
        self.wait_until(|| self.have_retired());
        if self.is_broken() {
            return self.abandon();
        }
        let past = self.lock().past;
        self.host.forget_guest(self, &past);
    }
    /// The same after a panic in what was done for it: every GPU VM is given up, and its device has a while to retire it.
    /// What does not retire is left behind; engines that are still in it touch memory that they keep mapped themselves.
    pub fn abandon(self: &Arc<Self>) {
        self.fail();
        let contexts = {
            let mut inner = self.lock();
            inner.resources.clear();
            let alive = std::mem::take(&mut inner.contexts).into_values();
            let retiring = std::mem::take(&mut inner.retiring).into_values().map(|(context, _)| context);
            alive.chain(retiring).collect::<Vec<_>>()
        };
        contexts.iter().for_each(Context::abandon);
        *self.lock_outbox() = Outbox::default();
        let until = Instant::now().checked_add(GRACE);
        let over = || until.is_none_or(|until| Instant::now() >= until);
        self.wait_while(|| {
            for context in &contexts {
                catch_unwind(AssertUnwindSafe(|| context.catch_up())).ok();
            }
            contexts.iter().any(|context| context.is_retiring()) && !over()
        });
        let past = self.lock().past;
        self.host.forget_guest(self, &past);
    }
    /// Its state may be half changed: who waits for it waits no longer.
    pub(crate) fn fail(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.wake_waiters();
    }
    /// The same, found by a thread that serves others too.
    pub(crate) fn fail_session(&self) {
        self.fail();
        self.port.failed();
    }
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
    /// Drops contexts and resources, and every record that waits.
    fn drop_everything(self: &Arc<Self>) {
        let contexts = {
            let mut inner = self.lock();
            inner.resources.clear();
            inner.quiet_due = false;
            for (_, farewell) in inner.retiring.values_mut() {
                *farewell = Farewell::None;
            }
            let contexts: Vec<_> = std::mem::take(&mut inner.contexts).into_values().collect();
            for context in &contexts {
                inner.retiring.insert(context.generation, (Arc::clone(context), Farewell::None));
            }
            contexts
        };
        contexts.iter().for_each(|context| self.end_context(context));
        self.lock_outbox().clear();
    }
}
