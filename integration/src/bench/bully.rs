//! P11: one guest's commands, jobs and faults beside guests that do the worst they may: [`crate::fairness`], as rows.

use super::Bench;
use super::report::{Figure, Goal, Row, Sides};
use crate::fairness::{Hostility, SLICE, run};
use anyhow::Result;
use clap::ValueEnum;
use serde_json::json;
use std::time::Duration;

/// P11.
///
/// # Errors
/// The daemon, or the guest that is measured, fails.
pub fn beside(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let quick = [Hostility::Faults, Hostility::Binds];
    let beside = if bench.quick { &quick } else { Hostility::value_variants() };
    let each = bench.slice * 10;
    // Guests, engines and queue threads share both cores here, as they would.
    bench.cores.release()?;
    let measured = run(beside, each.max(Duration::from_millis(200)), 1, |measured| {
        let figures = measured.p99();
        let us = |time: Duration| Figure::once(time.as_secs_f64() * 1e6);
        let sides = Sides { ours: us(figures.beside), reference: us(figures.alone) };
        let most = (figures.alone.mul_f64(1.5) + SLICE).as_secs_f64() * 1e6;
        let params =
            json!({ "operation": figures.operation, "beside": figures.hostility, "placement": "any core" });
        let new = Row::new("P11", "p99 of a guest's operation", "us", params);
        row(new.against("alone", sides).wants(Goal::AtMost(most)));
    });
    super::place::pin(bench.cores.here)?;
    measured
}
