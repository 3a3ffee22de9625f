use super::*;
use crate::host::Limits;
use crate::protocol::event::{FAULT_ATOMIC_ACCESS, FAULT_WRITE_ACCESS};

const GENERATION: u64 = 7;

fn quota() -> Arc<Quota> {
    Quota::new(&Limits { total_pending_faults: 1 << 20, ..Limits::DEFAULT })
}

fn fault(vm_id: u32, page: u64, pages: u16, stop: Option<u64>) -> NewPending {
    NewPending {
        vm_id,
        page,
        cpu_page: page + 1000,
        pages,
        stop: stop.map(StopId),
        perm: 1,
        fault_type: 0,
        level: 0,
        engine: 0,
        length_hint: 8,
        raised_ns: 0,
        raised_run: Duration::ZERO,
    }
}

fn raise(faults: &mut PendingFaults, quota: &Arc<Quota>, new: &NewPending) -> u64 {
    faults.reserve(GENERATION, quota).unwrap();
    faults.insert(new)
}

fn table(faults: &mut PendingFaults) -> &mut Table {
    faults.table.as_mut().unwrap()
}

/// The depth of the tree.
fn depth(table: &Table, node: Place, order: &Order) -> usize {
    let Some(pending) = order.entry(&table.list, node) else { return 0 };
    1 + depth(table, pending.left, order).max(depth(table, pending.right, order))
}

#[test]
fn entry_keeps_everything_that_was_reported() {
    let new = NewPending {
        vm_id: u32::MAX,
        page: (1 << 52) - 1,
        cpu_page: (1 << 44) - 1,
        pages: 512,
        stop: Some(StopId(u64::MAX)),
        perm: 18,
        fault_type: FAULT_ATOMIC_ACCESS,
        level: 255,
        engine: 254,
        length_hint: u32::MAX,
        raised_ns: 3,
        raised_run: Duration::from_secs(1 << 32),
    };
    let pending = Pending::new(&new, 5);
    assert_eq!((pending.page(), pending.cpu_page(), pending.pages()), ((1 << 52) - 1, (1 << 44) - 1, 512));
    assert_eq!((pending.perm(), pending.fault_type(), pending.level(), pending.engine()), (18, 2, 255, 254));
    assert_eq!((pending.first(), pending.is_prefetch(), pending.told()), (new.stop, false, None));
    assert_eq!((pending.raised_ns(), pending.raised_run), (3, 1_000_000_000 << 32));
    for perm in [1, 2, 3, 18, 19] {
        let new = NewPending { perm, stop: None, fault_type: FAULT_WRITE_ACCESS, ..fault(1, 9, 1, None) };
        let pending = Pending::new(&new, 5);
        assert_eq!((pending.perm(), pending.fault_type(), pending.first()), (perm, 1, None));
    }
}

#[test]
fn faults_are_told_in_their_order_and_ended_ones_never() {
    let (quota, mut faults) = (quota(), PendingFaults::default());
    let cookies: Vec<_> = (0..4).map(|n| raise(&mut faults, &quota, &fault(1, 10 - n, 1, Some(n)))).collect();
    let mark = faults.mark();
    let later = raise(&mut faults, &quota, &fault(1, 100, 3, Some(9)));
    faults.take(cookies[1]).unwrap();
    let told = |faults: &mut PendingFaults| faults.report(|cookie, pending, _| (cookie, pending.reported()));
    assert!(faults.is_next(mark));
    assert_eq!(told(&mut faults), Some((cookies[0], 0)));
    assert_eq!(faults.get(cookies[0]).unwrap().told(), Some(1));
    assert_eq!(told(&mut faults), Some((cookies[2], 0)));
    faults.take(cookies[3]).unwrap();
    // What came at the mark goes before the group, of which the guest knows all with its last record.
    assert!(!faults.is_next(mark) && faults.has_untold());
    for nth in 0..3 {
        assert_eq!(faults.get(later).unwrap().told(), None);
        assert_eq!(told(&mut faults), Some((later, nth)));
    }
    assert_eq!(faults.get(later).unwrap().told(), Some(1));
    assert!(!faults.has_untold() && told(&mut faults).is_none());
}

#[test]
fn those_who_join_are_released_in_their_order() {
    let (quota, mut faults) = (quota(), PendingFaults::default());
    let single = raise(&mut faults, &quota, &fault(1, 5, 1, Some(1)));
    let ahead = raise(&mut faults, &quota, &fault(1, 8, 4, None));
    assert!(faults.is_advice(ahead) && !faults.is_advice(single));
    for (page, stop) in [(5, 2), (5, 3), (9, 4), (11, 5)] {
        assert!(faults.join(1, page, StopId(stop), 2));
    }
    assert!(!faults.is_advice(ahead));
    assert!(!faults.join(1, 12, StopId(9), 1) && !faults.join(2, 5, StopId(9), 1));
    // Only of a single page the record asks for what joined.
    assert_eq!((faults.get(single).unwrap().perm(), faults.get(ahead).unwrap().perm()), (3, 1));
    let waiters = |taken: Option<Taken>| taken.unwrap().waiters().map(|stop| stop.0).collect::<Vec<_>>();
    assert_eq!(waiters(faults.take(single)), [1, 2, 3]);
    assert_eq!(faults.take_joined(ahead), [StopId(5)]);
    assert_eq!(waiters(faults.take(ahead)), [4]);
    assert!(faults.take(ahead).is_none() && faults.get(single).is_none());
}

#[test]
fn cookie_of_another_context_or_time_names_nothing() {
    let (quota, mut faults) = (quota(), PendingFaults::default());
    let cookie = raise(&mut faults, &quota, &fault(1, 5, 1, Some(1)));
    assert!(faults.get(cookie).is_some());
    for other in [cookie ^ (1 << 32), cookie + 1, cookie - 1, 0, u64::MAX] {
        assert!(faults.get(other).is_none() && faults.take(other).is_none(), "{other:#x}");
    }
    faults.take(cookie).unwrap();
    assert_ne!(raise(&mut faults, &quota, &fault(1, 5, 1, Some(1))), cookie);
}

#[test]
fn numbers_that_begin_anew_pass_over_those_that_are_pending() {
    let (quota, mut faults) = (quota(), PendingFaults::default());
    let old: Vec<_> = (0..3).map(|page| raise(&mut faults, &quota, &fault(1, page, 1, Some(page)))).collect();
    table(&mut faults).last = u32::MAX - 1;
    let new: Vec<_> = (3..9).map(|page| raise(&mut faults, &quota, &fault(1, page, 1, Some(page)))).collect();
    let lower: Vec<_> = new.iter().map(|cookie| cookie & u64::from(u32::MAX)).collect();
    assert_eq!(lower, [u64::from(u32::MAX), 0, 4, 5, 6, 7]);
    for (page, cookie) in (0..).zip(old.iter().chain(&new)) {
        assert_eq!(faults.get(*cookie).map(Pending::page), Some(page));
    }
    let told: Vec<_> = (0..9).filter_map(|_| faults.report(|cookie, _, _| cookie)).collect();
    assert_eq!(told, [old.clone(), new.clone()].concat());
    for cookie in old.iter().chain(&new) {
        assert!(faults.take(*cookie).is_some());
    }
    assert_eq!(faults.count(), 0);
}

#[test]
fn pages_in_order_make_no_deep_tree() {
    let (quota, mut faults) = (quota(), PendingFaults::default());
    for page in 0..4096 {
        raise(&mut faults, &quota, &fault(1, page, 1, Some(page)));
    }
    let table = table(&mut faults);
    let depth = depth(table, table.order.root(), &table.order);
    assert!(depth <= 64, "{depth} entries one below the other");
}

/// What is pending, the simple way: GPU VM, range, waiters by cookie, in the order in which they were raised.
#[derive(Default)]
struct Plain(Vec<(u64, u32, PageRange, Vec<u64>)>);

impl Plain {
    fn covering(&mut self, vm: u32, page: u64) -> Option<&mut (u64, u32, PageRange, Vec<u64>)> {
        self.0.iter_mut().find(|(_, of, range, _)| *of == vm && range.contains(page))
    }
    fn free_from(&mut self, vm: u32, page: u64) -> PageRange {
        let start = self.covering(vm, page).map_or(page, |(_, _, range, _)| range.end);
        let starts = self.0.iter().filter(|(_, of, range, _)| *of == vm && range.start >= start);
        let end = starts.map(|(_, _, range, _)| range.start).min().unwrap_or(u64::MAX);
        PageRange { start, end }
    }
}

#[test]
fn table_does_what_a_plain_list_does() {
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u64) | 1;
    println!("seed {seed:#x}");
    let mut random = seed;
    let mut below = |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % end
    };
    let (quota, mut faults, mut plain) = (quota(), PendingFaults::default(), Plain::default());
    for n in 0..40_000_u64 {
        let most = if n % 8000 < 4000 { 400 } else { 40 };
        let (vm, page) = (u32::try_from(1 + below(2)).unwrap(), below(2000));
        let ends = plain.0.len() as u64 >= most || (below(5) < 2 && !plain.0.is_empty());
        if ends {
            let at = usize::try_from(below(plain.0.len() as u64)).unwrap();
            let (cookie, vm, range, waiters) = plain.0.remove(at);
            let taken = faults.take(cookie).unwrap();
            assert_eq!((taken.pending.vm_id, taken.pending.range()), (vm, range));
            assert_eq!(taken.waiters().map(|stop| stop.0).collect::<Vec<_>>(), waiters);
        } else if let Some((.., waiters)) = plain.covering(vm, page) {
            waiters.push(n);
            assert!(faults.join(vm, page, StopId(n), 1));
        } else {
            let free = plain.free_from(vm, page);
            let pages = 1 + below(8).min(free.end - page - 1);
            let new = fault(vm, page, u16::try_from(pages).unwrap(), Some(n).filter(|n| n % 7 > 0));
            let cookie = raise(&mut faults, &quota, &new);
            let range = PageRange { start: page, end: page + pages };
            plain.0.push((cookie, vm, range, new.stop.iter().map(|stop| stop.0).collect()));
        }
        let page = below(2000);
        assert_eq!(faults.free_from(vm, page), plain.free_from(vm, page));
        assert_eq!(
            (faults.count(), quota.used(Limit::TotalPendingFaults)),
            (plain.0.len(), plain.0.len() as u64)
        );
        let all = [PageRange { start: 0, end: u64::MAX }];
        let of_vm = plain.0.iter().filter(|(_, of, ..)| *of == vm).map(|(cookie, ..)| *cookie);
        if n % 16 == 0 {
            assert_eq!(faults.cookies_in(vm, &all), of_vm.collect::<Vec<_>>());
        }
        let room = faults.table.as_ref().map_or(0, |table| table.list.capacity());
        assert!(room <= 600, "room for {room} where there were 400 at most");
    }
}
