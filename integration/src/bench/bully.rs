//! P11: one guest's commands, jobs and faults beside guests that do the worst they may: [`crate::fairness`], as rows.

use super::Bench;
use super::report::{Figure, Goal, Row, Sides};
use crate::fairness::{Hostility, SLICE, Slow, run};
use anyhow::Result;
use clap::ValueEnum;
use serde_json::json;
use std::time::Duration;

/// The least time in which there are enough operations for a p99.
const LEAST: Duration = Duration::from_millis(100);

/// P11.
///
/// # Errors
/// The daemon, or the guest that is measured, fails.
pub fn beside(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let quick = [Hostility::Faults, Hostility::Binds];
    let beside = if bench.quick { &quick } else { &Hostility::value_variants()[1..] };
    // Guests, engines and queue threads share both cores here, as they would.
    bench.cores.release()?;
    let mut slow: Vec<(Slow, Vec<f64>, Vec<f64>)> = vec![];
    let measured = (0..bench.rounds).try_for_each(|_| {
        run(beside, bench.slice.max(LEAST) * 2, 1, |measured| {
            let figures = measured.p99();
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            let same = |known: &Slow| known.is_about(&figures);
            let place = slow.iter().position(|(known, ..)| same(known)).unwrap_or_else(|| {
                slow.push((figures, vec![], vec![]));
                slow.len() - 1
            });
            slow[place].1.push(us(figures.beside));
            slow[place].2.push(us(figures.alone));
        })
    });
    super::place::pin(bench.cores.here)?;
    measured?;
    for (what, beside, alone) in slow {
        let sides = Sides { ours: Figure::new(beside), reference: Figure::new(alone) };
        let most = 1.5 * sides.reference.median() + SLICE.as_secs_f64() * 1e6;
        let params =
            json!({ "operation": what.operation, "beside": what.hostility, "placement": "any core" });
        let new = Row::new("P11", "p99 of a guest's operation", "us", params);
        row(new.against("alone", sides).wants(Goal::AtMost(most.round())));
    }
    Ok(())
}
