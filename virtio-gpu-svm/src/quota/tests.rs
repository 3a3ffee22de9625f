//! Charges: refused at the limit and never before it, given back whatever becomes of them, also from several threads.

use super::*;

const TINY: Limits = Limits { total_jobs: 10, jobs: 3, ..Limits::DEFAULT };

fn row(quota: &Quota, limit: Limit) -> LimitStatus {
    let rows = quota.status(|_| 2);
    rows.into_iter().find(|row| row.name == limit.name()).unwrap()
}

#[test]
fn limit_is_granted_and_one_more_refused() {
    let quota = Quota::new(&TINY);
    let (mut a, mut b) = (quota.charge(Limit::TotalJobs), quota.charge(Limit::TotalJobs));
    a.grow(4).unwrap();
    b.grow(6).unwrap();
    assert_eq!((a.grow(1), quota.used(Limit::TotalJobs), a.amount()), (Err(Full(Limit::TotalJobs)), 10, 4));
    assert_eq!(b.grow(u64::MAX), Err(Full(Limit::TotalJobs)));
    b.shrink(1);
    a.grow(1).unwrap();
    drop(b);
    assert_eq!((quota.used(Limit::TotalJobs), a.most()), (5, 10));
    let expected =
        LimitStatus { name: "total_jobs", scope: "guest", used: 5, peak: 10, limit: 10, refused: 2 };
    assert_eq!(row(&quota, Limit::TotalJobs), expected);
}

#[test]
fn refused_resize_changes_nothing() {
    let quota = Quota::new(&TINY);
    let mut charge = quota.charge(Limit::TotalJobs);
    charge.resize(10).unwrap();
    assert_eq!(
        (charge.resize(11), charge.amount(), quota.used(Limit::TotalJobs)),
        (Err(Full(Limit::TotalJobs)), 10, 10)
    );
    charge.resize(2).unwrap();
    assert_eq!((charge.amount(), quota.used(Limit::TotalJobs)), (2, 2));
}

#[test]
fn amount_that_is_handed_over_counts_once() {
    let quota = Quota::new(&TINY);
    let mut a = quota.charge(Limit::TotalJobs);
    let mut b = a.sibling();
    a.grow(10).unwrap();
    b.take_from(&mut a, 4);
    assert_eq!((a.amount(), b.amount(), quota.used(Limit::TotalJobs)), (6, 4, 10));
    a.absorb(b);
    assert_eq!((a.amount(), quota.used(Limit::TotalJobs)), (10, 10));
    drop(a);
    assert_eq!(quota.used(Limit::TotalJobs), 0);
}

#[test]
fn charge_of_nobody_is_never_refused() {
    let mut charge = Charge::default();
    charge.grow(u64::MAX).unwrap();
    charge.resize(1).unwrap();
    assert_eq!((charge.amount(), charge.most()), (1, u64::MAX));
}

#[test]
fn limits_of_contexts_are_counted_where_they_are_refused() {
    let quota = Quota::new(&TINY);
    quota.note(Limit::Jobs, 3);
    quota.refuse(Limit::Jobs);
    let LimitStatus { used, peak, limit, refused, .. } = row(&quota, Limit::Jobs);
    assert_eq!((used, peak, limit, refused), (2, 3, 3, 1));
}

#[test]
fn each_limit_is_told_once() {
    let quota = Quota::new(&TINY);
    assert_eq!(quota.newly_reached(), []);
    quota.refuse(Limit::Leaves);
    quota.refuse(Limit::Contexts);
    assert_eq!(quota.newly_reached(), [Limit::Contexts, Limit::Leaves]);
    quota.refuse(Limit::Contexts);
    quota.refuse(Limit::Jobs);
    assert_eq!(quota.newly_reached(), [Limit::Jobs]);
}

#[test]
fn every_limit_of_an_operator_has_a_gauge() {
    let all: Vec<_> = Limit::ALL.into_iter().filter(|limit| limit.is_configured()).collect();
    assert_eq!(all.len(), GAUGES);
    let quota = Quota::new(&Limits::DEFAULT);
    for limit in all {
        assert_eq!(Some(row(&quota, limit).limit), Limits::DEFAULT.of(limit), "{limit}");
    }
}

#[test]
fn threads_never_hold_more_than_the_limit() {
    let quota = Quota::new(&TINY);
    std::thread::scope(|scope| {
        for n in 1..=4 {
            let quota = &quota;
            scope.spawn(move || {
                let mut charge = quota.charge(Limit::TotalJobs);
                for _ in 0..10_000 {
                    if charge.grow(n).is_ok() {
                        assert!(quota.used(Limit::TotalJobs) <= 10);
                        charge.shrink(n);
                    }
                }
            });
        }
    });
    let row = row(&quota, Limit::TotalJobs);
    assert_eq!(row.used, 0);
    assert!(row.peak <= 10, "{}", row.peak);
}
