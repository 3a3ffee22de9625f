//! What the process holds: no capabilities, none to be gained, and no core dump or debugger that shows guest memory.

use super::Measure;
use rustix::io::{Errno, Result};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// Gives up everything.
pub fn drop_all() -> [Measure; 3] {
    [
        Measure::of("no new privileges", set_no_new_privs(true), |()| "for this process and workers".into()),
        Measure::of("no capabilities", drop_capabilities(), str::to_owned),
        Measure::of("no core dumps", hide_memory(), |()| "not dumpable, no debugger, limit 0".into()),
    ]
}

/// Nobody but root sees this process' memory, in a core dump or by ptrace. That covers the daemon's own copies too, for
/// which there is no advice (MADV_DONTDUMP) to give; the limit tells children that are executed anew.
///
/// # Errors
/// None that a kernel of today has.
pub fn hide_memory() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
}

/// In this order: emptying the bounding set takes a capability.
fn drop_capabilities() -> Result<&'static str> {
    clear_ambient_capability_set()?;
    let emptied = empty_bounding_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    match emptied {
        Ok(()) => Ok("in any of the five sets"),
        // Without new privileges nothing comes out of it.
        Err(Errno::PERM) => Ok("in four sets; the bounding set is as its user's, and of no use"),
        Err(error) => Err(error),
    }
}

fn empty_bounding_set() -> Result<()> {
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The last one was before.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
