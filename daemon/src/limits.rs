//! From the configuration's limits to the core's. The names are the same; the core does without what it has no use for.

pub use config::{Limits, Overrides};

use virtio_gpu_svm::host::Limits as CoreLimits;

/// What the core is told of a guest's limits.
pub fn of(limits: &Limits) -> CoreLimits {
    let Limits {
        contexts,
        resources,
        resource_bytes,
        gpu_vms,
        mappings,
        total_mappings,
        table_bytes,
        pending_faults,
        total_pending_faults,
        jobs,
        total_jobs,
        queue_bytes,
        fault_deadline_ms,
        log_lines: _,
        sessions: _,
        busy_poll_us: _,
    } = *limits;
    CoreLimits {
        contexts,
        resources,
        resource_bytes,
        gpu_vms,
        mappings,
        total_mappings,
        table_bytes,
        pending_faults,
        total_pending_faults,
        jobs,
        total_jobs,
        queue_bytes,
        fault_deadline_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_gpu_svm::protocol::limit::Limit;

    #[test]
    fn defaults_are_the_cores() {
        assert_eq!(of(&Limits::default()), CoreLimits::DEFAULT);
    }

    #[test]
    fn each_limit_of_the_core_is_the_one_of_its_name() {
        let own = (1..).zip(Limits::BOUNDS).map(|(n, (name, least, _))| (name.to_owned(), least + n));
        let own: Vec<(String, u64)> = own.collect();
        let core = of(&Limits::default().with(&Overrides::new(own.clone()).unwrap()));
        for (name, number) in own {
            let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
            assert!(limit.is_none_or(|limit| core.of(limit) == Some(number)), "{name}: {core:?}");
            assert!(name != "fault_deadline_ms" || u64::from(core.fault_deadline_ms) == number);
        }
    }

    #[test]
    fn every_limit_of_the_core_has_its_name_in_the_configuration() {
        for limit in Limit::ALL.into_iter().filter(|limit| limit.is_configured()) {
            assert!(Limits::BOUNDS.iter().any(|(name, ..)| *name == limit.name()), "{limit}");
        }
    }
}
