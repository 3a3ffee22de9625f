//! What is reported: a row for each metric and set of parameters, with its reference, its goal, and whether it is met.
//!
//! All arithmetic on figures is here. A ratio is the median of the ratios of the rounds, ours by the reference of the same
//! round: what disturbs the machine for longer than a round disturbs both.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::fmt;

/// What one side came to in each round.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure(Vec<f64>);

impl Figure {
    /// Of rounds.
    pub fn new(rounds: Vec<f64>) -> Self {
        Self(rounds)
    }
    /// Of something that has no rounds: a count, or bytes.
    pub fn once(value: f64) -> Self {
        Self(vec![value])
    }
    /// The one in the middle, or the mean of the two there.
    pub fn median(&self) -> f64 {
        median(&self.0)
    }
    /// The least.
    pub fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }
    /// The most.
    pub fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
    /// The median of this one's rounds by the other's; by its median where they have not as many.
    pub fn ratio(&self, other: &Self) -> f64 {
        if self.0.len() != other.0.len() {
            return self.median() / other.median();
        }
        median(&self.0.iter().zip(&other.0).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
    }
    /// Each round changed alike.
    pub fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        Self(self.0.iter().copied().map(change).collect())
    }
}

/// The one in the middle, or the mean of the two there; not a number where there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { at(middle) } else { f64::midpoint(at(middle.wrapping_sub(1)), at(middle)) }
}

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Ours by the reference is at most this.
    RatioAtMost(f64),
    /// Ours by the reference is at least this.
    RatioAtLeast(f64),
    /// Ours is at most this, whatever the reference.
    AtMost(f64),
    /// Ours is at least this, whatever the reference.
    AtLeast(f64),
    /// Ours is exactly this.
    Exactly(f64),
    /// To be known, no more.
    None,
}

impl Goal {
    /// Whether it is met; `None` where there is none, or nothing to say it by.
    pub fn met(self, ours: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtMost(most) => ratio.map(|ratio| ratio <= most),
            Self::RatioAtLeast(least) => ratio.map(|ratio| ratio >= least),
            Self::AtMost(most) => Some(ours <= most),
            Self::AtLeast(least) => Some(ours >= least),
            Self::Exactly(value) => Some((ours - value).abs() < f64::EPSILON),
            Self::None => None,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtMost(most) => write!(f, "<= {most}x"),
            Self::RatioAtLeast(least) => write!(f, ">= {least}x"),
            Self::AtMost(most) => write!(f, "<= {most}"),
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::Exactly(value) => write!(f, "= {value}"),
            Self::None => write!(f, "-"),
        }
    }
}

/// One metric with one set of parameters.
#[derive(Clone, Debug)]
pub struct Row {
    /// P1 to P12.
    pub id: &'static str,
    /// What is measured.
    pub name: String,
    /// With what; the unit of both figures is among it.
    pub params: Map<String, Value>,
    /// What we came to, or why that is not known.
    pub ours: Result<Figure, String>,
    /// What the reference came to, or why that is not known.
    pub reference: Result<Figure, String>,
    /// What the reference is.
    pub reference_name: String,
    /// What is wanted.
    pub goal: Goal,
}

impl Row {
    /// A row whose figures are still to come.
    pub fn new(id: &'static str, name: &str, unit: &str, params: Value) -> Self {
        let mut all = Map::new();
        all.insert("unit".into(), unit.into());
        if let Value::Object(params) = params {
            all.extend(params);
        }
        let unknown = || Err("not measured".to_owned());
        let (name, reference_name) = (name.to_owned(), String::new());
        Self {
            id,
            name,
            params: all,
            ours: unknown(),
            reference: unknown(),
            reference_name,
            goal: Goal::None,
        }
    }
    /// With both sides of the same rounds.
    #[must_use]
    pub fn against(mut self, reference_name: &str, sides: Sides) -> Self {
        self.reference_name = reference_name.to_owned();
        (self.ours, self.reference) = (Ok(sides.ours), Ok(sides.reference));
        self
    }
    /// With ours alone, and why there is no reference.
    #[must_use]
    pub fn alone(mut self, ours: Figure, reference_name: &str, why: &str) -> Self {
        self.reference_name = reference_name.to_owned();
        (self.ours, self.reference) = (Ok(ours), Err(why.to_owned()));
        self
    }
    /// With a goal.
    #[must_use]
    pub fn wants(mut self, goal: Goal) -> Self {
        self.goal = goal;
        self
    }
    /// With nothing, and why.
    #[must_use]
    pub fn unmeasured(mut self, why: &str) -> Self {
        (self.ours, self.reference) = (Err(why.to_owned()), Err(why.to_owned()));
        self
    }
    /// Ours by the reference.
    pub fn ratio(&self) -> Option<f64> {
        let (ours, reference) = (self.ours.as_ref().ok()?, self.reference.as_ref().ok()?);
        Some(ours.ratio(reference)).filter(|ratio| ratio.is_finite())
    }
    /// Whether the goal is met.
    pub fn met(&self) -> Option<bool> {
        self.goal.met(self.ours.as_ref().ok()?.median(), self.ratio())
    }
    /// One JSON object. What stands beside the medians is among the parameters.
    pub fn json(&self) -> Value {
        let mut params = self.params.clone();
        for (side, figure) in [("ours", &self.ours), ("reference", &self.reference)] {
            match figure {
                Ok(figure) => {
                    params.insert(format!("{side}_min"), figure.min().into());
                    params.insert(format!("{side}_max"), figure.max().into());
                }
                Err(why) => {
                    params.insert(format!("{side}_not_measured"), why.as_str().into());
                }
            }
        }
        let median = |figure: &Result<Figure, String>| figure.as_ref().ok().map(Figure::median);
        json!({
            "id": self.id,
            "name": self.name,
            "params": params,
            "ours": median(&self.ours),
            "reference": median(&self.reference),
            "reference_name": self.reference_name,
            "ratio": self.ratio(),
            "goal": self.goal.to_string(),
            "met": self.met(),
        })
    }
    fn parameters(&self) -> String {
        let shown = self.params.iter().filter(|(name, _)| *name != "unit");
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        shown.map(|(name, value)| format!("{name} {}", text(value))).collect::<Vec<_>>().join(", ")
    }
}

/// Both sides, of the same rounds.
#[derive(Clone, Debug)]
pub struct Sides {
    /// What we came to.
    pub ours: Figure,
    /// What the reference came to.
    pub reference: Figure,
}

impl Sides {
    /// Both changed alike.
    #[must_use]
    pub fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        Self { ours: self.ours.map(&change), reference: self.reference.map(&change) }
    }
}

/// Measures both sides in turn, so many rounds, each after a first one that does not count.
///
/// # Errors
/// What either side says.
pub fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut reference: impl FnMut() -> Result<f64>,
) -> Result<Sides> {
    ours().context("ours")?;
    reference().context("the reference")?;
    let mut sides = (vec![], vec![]);
    for _ in 0..rounds {
        sides.0.push(ours().context("ours")?);
        sides.1.push(reference().context("the reference")?);
    }
    Ok(Sides { ours: Figure::new(sides.0), reference: Figure::new(sides.1) })
}

/// What stands above rows.
pub const HEADER: &str =
    "      ours [least .. most]          reference [least .. most]     ratio    goal      met  metric";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |figure: &Result<Figure, String>| match figure {
            Ok(figure) => {
                format!("{} [{} .. {}]", short(figure.median()), short(figure.min()), short(figure.max()))
            }
            Err(_) => "-".to_owned(),
        };
        let ratio = self.ratio().map_or_else(|| "-".to_owned(), short);
        let met = match self.met() {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        let unit = self.params.get("unit").and_then(Value::as_str).unwrap_or_default();
        write!(
            f,
            "{:<4}  {:<28}  {:<28}  {ratio:>6}  {:>8}  {met:>3}  {}, {unit} ({}) / {}",
            self.id,
            side(&self.ours),
            side(&self.reference),
            self.goal.to_string(),
            self.name,
            self.parameters(),
            self.reference_name,
        )?;
        let why = self.ours.as_ref().err().or(self.reference.as_ref().err());
        why.map_or(Ok(()), |why| write!(f, " [{why}]"))
    }
}

/// Three digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(ours: &[f64], reference: &[f64]) -> Sides {
        Sides { ours: Figure::new(ours.to_vec()), reference: Figure::new(reference.to_vec()) }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn median_is_the_middle_one_or_the_mean_of_two() {
        assert!(close(median(&[5.0, 1.0, 3.0]), 3.0));
        assert!(close(median(&[4.0, 1.0, 3.0, 2.0]), 2.5));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn spread_is_the_least_and_the_most_round() {
        let figure = Figure::new(vec![2.0, 9.0, 1.0]);
        assert!(close(figure.min(), 1.0) && close(figure.max(), 9.0));
    }

    #[test]
    fn ratio_is_taken_in_each_round() {
        // The machine is three times as slow in the second round, for both. Medians alone would say 0.4.
        let Sides { ours, reference } = sides(&[10.0, 30.0, 12.0], &[20.0, 60.0, 30.0]);
        assert!(close(ours.ratio(&reference), 0.5));
        assert!(close(ours.ratio(&Figure::once(6.0)), 2.0));
    }

    #[test]
    fn goal_is_met_at_its_bound_and_not_beyond() {
        assert_eq!(Goal::RatioAtMost(1.1).met(9.0, Some(1.1)), Some(true));
        assert_eq!(Goal::RatioAtMost(1.1).met(9.0, Some(1.11)), Some(false));
        assert_eq!(Goal::RatioAtLeast(3.0).met(9.0, Some(3.0)), Some(true));
        assert_eq!(Goal::RatioAtLeast(3.0).met(9.0, Some(2.9)), Some(false));
        assert_eq!(Goal::AtMost(10.0).met(10.0, None), Some(true));
        assert_eq!(Goal::AtMost(10.0).met(10.1, None), Some(false));
        assert_eq!(Goal::AtLeast(10.0).met(9.9, None), Some(false));
        assert_eq!(Goal::Exactly(1.0).met(1.0, None), Some(true));
        assert_eq!(Goal::Exactly(1.0).met(2.0, None), Some(false));
    }

    #[test]
    fn goal_against_a_missing_reference_is_not_known() {
        assert_eq!(Goal::RatioAtMost(1.1).met(9.0, None), None);
        assert_eq!(Goal::None.met(9.0, Some(1.0)), None);
    }

    #[test]
    fn line_has_each_field_and_the_spread_among_the_parameters() {
        let row = Row::new("P2", "no-op rate", "1/s", json!({ "depth": 64 }))
            .against("null", sides(&[30.0, 10.0, 20.0], &[10.0, 10.0, 10.0]))
            .wants(Goal::RatioAtLeast(3.0));
        let expected = json!({
            "id": "P2", "name": "no-op rate", "ours": 20.0, "reference": 10.0, "reference_name": "null", "ratio": 2.0,
            "goal": ">= 3x", "met": false,
            "params": {
                "unit": "1/s", "depth": 64, "ours_min": 10.0, "ours_max": 30.0, "reference_min": 10.0,
                "reference_max": 10.0,
            },
        });
        assert_eq!(row.json(), expected);
    }

    #[test]
    fn line_without_a_reference_says_why() {
        let row = Row::new("P3", "bind", "ns", json!({})).alone(Figure::once(4.0), "QEMU", "no package");
        let line = row.wants(Goal::RatioAtLeast(1.0)).json();
        assert_eq!(line["params"]["reference_not_measured"], "no package");
        assert!(line["reference"].is_null() && line["ratio"].is_null() && line["met"].is_null());
    }

    #[test]
    fn rounds_alternate_after_one_that_does_not_count() {
        let order = std::cell::RefCell::new(String::new());
        let side = |name: char| {
            order.borrow_mut().push(name);
            Ok(order.borrow().chars().filter(|other| *other == name).count() as f64)
        };
        let sides = alternate(2, || side('o'), || side('r')).unwrap();
        assert_eq!(*order.borrow(), "ororor");
        assert_eq!(sides.ours, Figure::new(vec![2.0, 3.0]));
    }
}
