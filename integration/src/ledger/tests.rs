//! Each kind of error, seeded into accounts that agree, must be seen as that kind.

use super::*;

const CONTEXTS: u32 = 3;
const DEVICES: usize = 2;
const WINDOWS: u64 = 5;

struct Accounts {
    raised: Vec<Raised>,
    answered: Vec<Answered>,
    geometry: Vec<Touch>,
}

impl Accounts {
    fn compare(&self) -> Comparison {
        compare(&self.raised, &self.answered, &self.geometry)
    }
}

fn asid(ctx_id: u32, device: usize) -> u32 {
    100 * (u32::try_from(device).unwrap() + 1) + ctx_id
}

/// Every context touches the same windows on both devices; the guest is asked about the first device's only. Which
/// access is used depends on the context, as in real jobs.
fn agreeing() -> Accounts {
    let guest: Arc<str> = "g0".into();
    let mut accounts = Accounts { raised: vec![], answered: vec![], geometry: vec![] };
    for ctx_id in 1..=CONTEXTS {
        for device in 0..DEVICES {
            for window in 0..WINDOWS {
                let page = window * WINDOW_PAGES + u64::from(ctx_id);
                let access = [Access::Read, Access::Write, Access::Atomic][(ctx_id as usize + device) % 3];
                accounts.raised.push(Raised {
                    device,
                    guest: guest.clone(),
                    ctx_id,
                    asid: asid(ctx_id, device),
                    page,
                    access,
                });
                accounts.geometry.push(Touch {
                    guest: guest.clone(),
                    ctx_id,
                    device,
                    page: window * WINDOW_PAGES,
                    cpu_page: 0x7000 + window * WINDOW_PAGES,
                    access,
                    outcome: Outcome::Served,
                });
                if device == 0 {
                    accounts.answered.push(Answered {
                        guest: guest.clone(),
                        ctx_id,
                        cookie: u64::from(ctx_id) << 32 | window,
                        device,
                        asid: asid(ctx_id, device),
                        page,
                        cpu_page: 0x7000 + page,
                        access,
                        success: true,
                    });
                }
            }
        }
    }
    accounts
}

#[test]
fn agreeing_accounts_have_no_difference() {
    let result = agreeing().compare();
    assert!(result.agrees(), "{result}");
    assert_eq!(result.raised, 30);
    assert_eq!(result.answered, 15);
    assert_eq!(result.served_locally, 15);
    assert!(result.differences.is_empty());
}

#[test]
fn a_record_sent_to_another_context_is_misrouted() {
    let mut accounts = agreeing();
    accounts.answered[0].ctx_id = 2;
    let result = accounts.compare();
    assert_eq!(result.misrouted, 1, "{result}");
    assert!(result.differences[0].contains("asid 101 is context 1 of g0"), "{result}");
}

#[test]
fn swapped_records_of_equal_shape_are_misrouted() {
    let mut accounts = agreeing();
    for raised in &mut accounts.raised {
        raised.access = Access::Read;
    }
    for touch in &mut accounts.geometry {
        touch.access = Access::Read;
    }
    for answer in &mut accounts.answered {
        answer.access = Access::Read;
        answer.ctx_id = match answer.ctx_id {
            1 => 2,
            2 => 1,
            other => other,
        };
    }
    assert_eq!(accounts.compare().misrouted, 2 * WINDOWS);
}

#[test]
fn a_record_of_another_guest_is_misrouted() {
    let mut accounts = agreeing();
    accounts.answered[3].guest = "g1".into();
    assert_eq!(accounts.compare().misrouted, 1);
}

#[test]
fn a_record_with_another_access_or_page_is_misrouted() {
    let mut accounts = agreeing();
    accounts.answered[0].page += 100 * WINDOW_PAGES;
    accounts.answered[1].access = Access::Atomic;
    assert_eq!(accounts.compare().misrouted, 2);
}

#[test]
fn a_fault_that_nobody_answers_is_lost() {
    let mut accounts = agreeing();
    accounts.answered.remove(0);
    let result = accounts.compare();
    assert_eq!(result.lost, 2, "both devices' faults of that window have no pages: {result}");
    assert_eq!(result.misrouted, 0);
}

#[test]
fn a_fault_that_was_only_refused_is_lost() {
    let mut accounts = agreeing();
    accounts.answered[0].success = false;
    assert_eq!(accounts.compare().lost, 1);
}

#[test]
fn a_touch_that_raised_nothing_is_lost() {
    let mut accounts = agreeing();
    let gone = accounts.raised.iter().position(|r| r.device == 1).unwrap();
    accounts.raised.remove(gone);
    let result = accounts.compare();
    assert_eq!(result.lost, 1, "{result}");
    assert!(result.differences[0].contains("never raised"), "{result}");
}

#[test]
fn a_repeated_cookie_is_answered_twice() {
    let mut accounts = agreeing();
    accounts.answered.push(accounts.answered[4].clone());
    let result = accounts.compare();
    assert_eq!((result.answered_twice, result.misrouted), (1, 0), "{result}");
}

#[test]
fn a_fault_raised_again_is_unexpected() {
    let mut accounts = agreeing();
    accounts.raised.push(accounts.raised[0].clone());
    assert_eq!(accounts.compare().unexpected, 1);
}

#[test]
fn a_fault_of_a_page_that_no_job_touches_is_unexpected() {
    let mut accounts = agreeing();
    accounts.raised.push(Raised { page: 999 * WINDOW_PAGES, ..accounts.raised[0].clone() });
    assert_eq!(accounts.compare().unexpected, 1);
}

#[test]
fn outcomes_other_than_served_are_counted_apart() {
    let mut accounts = agreeing();
    let extra = |page, outcome| {
        let raised = Raised { page, ..agreeing().raised[0].clone() };
        let touch = Touch { page, cpu_page: page, outcome, ..agreeing().geometry[0].clone() };
        (raised, touch)
    };
    let (raised, touch) = extra(1000 * WINDOW_PAGES, Outcome::Refused);
    accounts.raised.push(raised);
    accounts.geometry.push(touch);
    let (raised, touch) = extra(1001 * WINDOW_PAGES, Outcome::Uncertain);
    accounts.raised.push(raised);
    accounts.geometry.push(touch);
    let (_, touch) = extra(1002 * WINDOW_PAGES, Outcome::Uncertain);
    accounts.geometry.push(touch);
    let result = accounts.compare();
    assert!(result.agrees(), "{result}");
    assert_eq!((result.refused, result.dropped), (1, 1), "{result}");
}

#[test]
fn every_difference_is_counted_but_only_the_first_are_explained() {
    let mut accounts = agreeing();
    for index in 0..100 {
        let page = (5000 + index) * WINDOW_PAGES;
        accounts.raised.push(Raised { page, ..accounts.raised[0].clone() });
    }
    let result = accounts.compare();
    assert_eq!(result.unexpected, 100);
    assert_eq!(result.differences.len(), EXPLAINED);
}
