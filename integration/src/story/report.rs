//! What a telling came to: the demo's one JSON object.

use super::PlainPointers;
use crate::ledger::Comparison;
use serde::Serialize;

/// Counts of faults, from three ledgers.
#[derive(Clone, Debug, Serialize)]
pub struct Faults {
    /// By devices, below the router.
    pub raised: u64,
    /// Of them, resolved from what was known of the process.
    pub served_locally: u64,
    /// Of them, answered by the guest that was asked.
    pub answered: u64,
    /// Of them, ended as an error of the job that touched what is not bound.
    pub refused: u64,
    /// Of them, of the process that went away.
    pub dropped: u64,
    /// Asked of a context that did not raise them.
    pub misrouted: u64,
    /// Raised or due, and never resolved.
    pub lost: u64,
}

impl From<&Comparison> for Faults {
    fn from(comparison: &Comparison) -> Self {
        Self {
            raised: comparison.raised,
            served_locally: comparison.served_locally,
            answered: comparison.answered,
            refused: comparison.refused,
            dropped: comparison.dropped,
            misrouted: comparison.misrouted,
            lost: comparison.lost,
        }
    }
}

/// A telling.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How the guests ran.
    pub vmm: &'static str,
    /// Guests.
    pub guests: usize,
    /// Processes of each guest.
    pub processes: usize,
    /// Host devices.
    pub devices: usize,
    /// A and B.
    pub cpu_range: [String; 2],
    /// C and D.
    pub gpu_range: [String; 2],
    /// Most GPU VMs that waited for an answer at one time.
    pub peak_pending_vms: u64,
    /// Counts.
    pub faults: Faults,
    /// Bytes that were not as they must be, over all processes.
    pub data_mismatches: u64,
    /// The third act; none where the daemon misroutes on purpose.
    pub plain_pointers: Option<PlainPointers>,
    /// From the first mapping to the last result.
    pub seconds: f64,
    /// Whether the three ledgers agree in everything.
    #[serde(skip)]
    pub agrees: bool,
}

impl Report {
    /// Whether everything was as it must be.
    pub fn holds(&self) -> bool {
        let vms = self.guests * self.processes * self.devices;
        self.agrees
            && self.faults.misrouted == 0
            && self.faults.lost == 0
            && self.data_mismatches == 0
            && self.peak_pending_vms == vms as u64
            && self.plain_pointers.as_ref().is_some_and(|act| act.holds(self.guests, self.devices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACT: PlainPointers =
        PlainPointers { programs: 4, nodes: 2000, walks: 8, wrong: 0, answered: 4, misrouted: 0 };

    fn report(plain_pointers: Option<PlainPointers>) -> Report {
        let faults = Faults {
            raised: 20,
            served_locally: 4,
            answered: 13,
            refused: 1,
            dropped: 2,
            misrouted: 0,
            lost: 0,
        };
        Report {
            vmm: "inproc",
            guests: 2,
            processes: 2,
            devices: 2,
            cpu_range: Default::default(),
            gpu_range: Default::default(),
            peak_pending_vms: 8,
            faults,
            data_mismatches: 0,
            plain_pointers,
            seconds: 1.0,
            agrees: true,
        }
    }

    #[test]
    fn telling_holds_with_a_whole_third_act_only() {
        assert!(report(Some(ACT)).holds());
        let broken = [
            None,
            Some(PlainPointers { programs: 2, walks: 4, ..ACT }),
            Some(PlainPointers { walks: 7, ..ACT }),
            Some(PlainPointers { wrong: 1, ..ACT }),
            Some(PlainPointers { answered: 3, ..ACT }),
            Some(PlainPointers { misrouted: 1, ..ACT }),
        ];
        for act in broken {
            let report = report(act);
            assert!(!report.holds(), "{report:?}");
        }
    }
}
