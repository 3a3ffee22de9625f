//! What panics write. A panic is a fault of ours and ends one session or request, and whoever knows how to cause one could
//! do so again and again: so they have a budget of lines too, one for the process.

use crate::log_budget::LogBudget;
use std::panic::{PanicHookInfo, set_hook, take_hook};

/// A panic hook.
pub type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

/// Has panics told by the hook that is there, with whatever it adds (a backtrace), but so many a minute. What is left out
/// is counted; that a session ended for one is told all the same, by the session.
pub fn install(panics: u32) {
    set_hook(within(LogBudget::new("panics".to_owned(), panics), take_hook()));
}

/// A hook that tells what its budget has room for. The main thread's panic ends the daemon and is told in any case.
fn within(budget: LogBudget, tell: Hook) -> Hook {
    Box::new(move |panic| match std::thread::current().name() {
        Some("main") => tell(panic),
        _ => budget.log(|| tell(panic)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::Builder;

    /// Panics so often on threads of this name, with room for two.
    fn told(name: &str, times: usize) -> usize {
        // The hook is the process', whose other tests have panics of their own.
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&count);
        let about = format!("on purpose {name}");
        let ours = about.clone();
        let tell: Hook = Box::new(move |panic| {
            if panic.payload_as_str() == Some(&ours) {
                counting.fetch_add(1, Ordering::Relaxed);
            }
        });
        let budget = within(LogBudget::new(about.clone(), 2), tell);
        let ours = about.clone();
        let before = take_hook();
        set_hook(Box::new(move |panic| match panic.payload_as_str() {
            Some(text) if text == ours => budget(panic),
            _ => before(panic),
        }));
        for _ in 0..times {
            let about = about.clone();
            let thread = Builder::new().name(name.to_owned()).spawn(move || std::panic::panic_any(about));
            assert!(thread.unwrap().join().is_err());
        }
        count.load(Ordering::Relaxed)
    }

    #[test]
    fn panics_are_told_within_their_budget_and_those_that_end_the_daemon_always() {
        assert_eq!(told("engine", 5), 2);
        assert_eq!(told("main", 5), 5);
    }
}
