//! Who may connect to a control socket, and how many may be connected.
//!
//! The socket's mode says who can connect; [`Options::users`] says who may, by the user id that the kernel tells of the
//! peer. *Owners*, the daemon's own user and root, always may. Everybody else has a share of the connections, and the
//! last ones are the owners', so that nobody can shut them out. A connection that has not asked for anything in a while
//! gives way to a new one; a subscriber has asked for everything to come.

use super::methods::Rights;
use super::rpc::{Error, Kind};
use crate::fuse::LogLimit;
use crate::log_budget::LogBudget;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The user id of a peer whose own has no number here (`/proc/sys/kernel/overflowuid`), or that has none.
const NOBODY: u32 = 65534;

/// Whose requests are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Users {
    /// Whoever the socket's mode lets in.
    All,
    /// The owners and these user ids.
    Only(Vec<u32>),
}

/// What clients of one control socket may do, and how much of it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which methods it has.
    pub rights: Rights,
    /// Whose requests are served.
    pub users: Users,
    /// User ids that are always served and have no share.
    pub owners: Vec<u32>,
    /// Connections at once. Another one is told so and closed.
    pub max_connections: usize,
    /// Of these, for one user who is no owner.
    pub per_user: usize,
    /// Of these, for owners only.
    pub reserved: usize,
    /// A connection that has sent no request for so long may be closed for another one.
    pub idle: Duration,
    /// A client that takes less than 64 KiB in this time while there is more for it is cut off.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rights: Rights::Full,
            users: Users::Only(Vec::new()),
            owners: vec![0, rustix::process::geteuid().as_raw()],
            max_connections: 64,
            per_user: 16,
            reserved: 8,
            idle: Duration::from_secs(30),
            stall: Duration::from_secs(10),
        }
    }
}

/// The connections of one socket.
pub(super) struct Admission {
    options: Options,
    places: Vec<Weak<Place>>,
    log: LogLimit,
    budget: Arc<LogBudget>,
}

/// One connection's place among them.
pub(super) struct Place {
    uid: u32,
    owner: bool,
    /// Guards since when it has nothing to do; `None` while it has. A section is one assignment or look.
    idle_since: Mutex<Option<Instant>>,
    /// It was told to give way and does not count any more.
    leaving: AtomicBool,
    leave: Notify,
}

impl Place {
    /// It waits for a request, or does not.
    pub fn set_idle(&self, idle: bool) {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = idle.then(Instant::now);
    }

    /// Until it is to give way.
    pub async fn told_to_leave(&self) {
        self.leave.notified().await;
    }

    fn idle_for(&self) -> Option<Duration> {
        self.idle_since.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }
}

impl Admission {
    /// No connection yet; lines about those that are refused come from this budget.
    pub fn new(options: Options, budget: Arc<LogBudget>) -> Self {
        Self { options, places: Vec::new(), log: LogLimit::default(), budget }
    }

    /// A place for one more connection, of a peer with this user id.
    ///
    /// # Errors
    /// [`Kind::NotPermitted`], [`Kind::TooManyConnections`].
    pub fn admit(&mut self, uid: Option<u32>) -> Result<Arc<Place>, Error> {
        let uid = uid.unwrap_or(NOBODY);
        let owner = self.options.owners.contains(&uid);
        let known = match &self.options.users {
            Users::All => true,
            Users::Only(users) => owner || users.contains(&uid),
        };
        if !known {
            self.note(uid, "a user who may not use it");
            let message = format!("user id {uid} may not use this socket (daemon.control_users)");
            return Err(Error::new(Kind::NotPermitted, message));
        }
        self.make_room_for(uid, owner).inspect_err(|_| self.note(uid, "too many connections"))?;
        let place = Place {
            uid,
            owner,
            idle_since: Mutex::new(Some(Instant::now())),
            leaving: AtomicBool::new(false),
            leave: Notify::new(),
        };
        let place = Arc::new(place);
        self.places.push(Arc::downgrade(&place));
        Ok(place)
    }

    fn note(&self, uid: u32, reason: &'static str) {
        if self.log.admits() {
            self.budget.log(|| {
                tracing::warn!(uid, reason, "control connection refused; more of them may not be told");
            });
        }
    }

    fn make_room_for(&mut self, uid: u32, owner: bool) -> Result<(), Error> {
        self.places.retain(|place| place.strong_count() > 0);
        let Options { max_connections, per_user, reserved, .. } = self.options;
        if owner {
            return self.below(max_connections, |_| true).map_err(|()| {
                full(format!("all {max_connections} control connections are in use; close one and try again"))
            });
        }
        self.below(per_user, |place| place.uid == uid)
            .map_err(|()| full(format!("user id {uid} has {per_user} control connections already")))?;
        let others = max_connections.saturating_sub(reserved);
        self.below(others, |place| !place.owner)
            .and_then(|()| if self.count(|_| true) < max_connections { Ok(()) } else { Err(()) })
            .map_err(|()| full("all control connections that are not reserved are in use".to_owned()))
    }

    /// Makes sure that fewer than `most` of these are there: one that is idle gives way.
    fn below(&self, most: usize, among: impl Fn(&Place) -> bool) -> Result<(), ()> {
        if self.count(&among) < most {
            return Ok(());
        }
        let idle = self.present().filter(|place| among(place));
        let idle = idle.filter_map(|place| Some((place.idle_for()?, place)));
        let longest = idle.max_by_key(|(time, _)| *time).filter(|(time, _)| *time >= self.options.idle);
        let (_, place) = longest.ok_or(())?;
        place.leaving.store(true, Ordering::Relaxed);
        place.leave.notify_one();
        Ok(())
    }

    fn count(&self, among: impl Fn(&Place) -> bool) -> usize {
        self.present().filter(|place| among(place)).count()
    }

    fn present(&self) -> impl Iterator<Item = Arc<Place>> {
        self.places.iter().filter_map(Weak::upgrade).filter(|place| !place.leaving.load(Ordering::Relaxed))
    }
}

fn full(message: String) -> Error {
    Error::new(Kind::TooManyConnections, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u32 = 100;

    fn admission(idle: Duration) -> Admission {
        let options = Options {
            users: Users::Only(vec![1, 2, 3, 4]),
            owners: vec![0, OWNER],
            max_connections: 6,
            per_user: 2,
            reserved: 2,
            idle,
            ..Options::default()
        };
        Admission::new(options, Arc::new(LogBudget::new("x".to_owned(), 1)))
    }

    fn refused(outcome: Result<Arc<Place>, Error>) -> Kind {
        outcome.map(|_| ()).unwrap_err().kind
    }

    #[test]
    fn strangers_and_peers_without_a_number_are_refused() {
        let mut admission = admission(Duration::MAX);
        assert_eq!(refused(admission.admit(Some(5))), Kind::NotPermitted);
        assert_eq!(refused(admission.admit(None)), Kind::NotPermitted);
        assert!(admission.admit(Some(1)).is_ok());
        assert!(admission.admit(Some(OWNER)).is_ok());
    }

    #[test]
    fn others_have_shares_and_owners_what_is_reserved() {
        let mut admission = admission(Duration::MAX);
        let mut held: Vec<_> = [1, 1, 2, 2].map(|uid| admission.admit(Some(uid)).unwrap()).into();
        assert_eq!(refused(admission.admit(Some(1))), Kind::TooManyConnections);
        assert_eq!(refused(admission.admit(Some(3))), Kind::TooManyConnections);
        held.extend([OWNER, OWNER].map(|uid| admission.admit(Some(uid)).unwrap()));
        assert_eq!(refused(admission.admit(Some(OWNER))), Kind::TooManyConnections);
        held.remove(0);
        assert!(admission.admit(Some(3)).is_ok());
    }

    #[test]
    fn owners_may_take_all_and_others_then_nothing() {
        let mut admission = admission(Duration::MAX);
        let _held: Vec<_> = (0..6).map(|_| admission.admit(Some(OWNER)).unwrap()).collect();
        assert_eq!(refused(admission.admit(Some(1))), Kind::TooManyConnections);
    }

    #[test]
    fn connections_that_have_ended_leave_nothing_behind() {
        let mut admission = admission(Duration::MAX);
        (0..100).for_each(|_| drop(admission.admit(Some(1)).unwrap()));
        assert_eq!(admission.places.len(), 1);
    }

    #[test]
    fn idle_connection_of_the_same_user_gives_way_and_a_busy_one_does_not() {
        let mut admission = admission(Duration::ZERO);
        let (busy, idle) = (admission.admit(Some(1)).unwrap(), admission.admit(Some(1)).unwrap());
        let other = admission.admit(Some(2)).unwrap();
        busy.set_idle(false);
        let third = admission.admit(Some(1)).unwrap();
        third.set_idle(false);
        let left = |place: &Place| place.leaving.load(Ordering::Relaxed);
        assert!(left(&idle) && !left(&busy) && !left(&other));
        assert_eq!(refused(admission.admit(Some(1))), Kind::TooManyConnections);
    }
}
