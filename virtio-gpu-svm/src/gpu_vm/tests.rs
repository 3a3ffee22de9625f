use super::*;
use std::collections::HashMap;

fn range(start: u64, end: u64) -> PageRange {
    PageRange { start, end }
}
fn userptr(start: u64, end: u64, cpu: u64) -> GpuVa {
    GpuVa { range: range(start, end), backing: Backing::Userptr(cpu), readonly: false }
}
fn blob(start: u64, end: u64, of: &Arc<Blob>, page: u64) -> GpuVa {
    GpuVa { range: range(start, end), backing: Backing::Blob(Arc::clone(of), page), readonly: false }
}
fn shape(mappings: &Mappings) -> Vec<(u64, u64, u64)> {
    mappings
        .iter()
        .map(|va| match va.backing {
            Backing::Userptr(cpu) => (va.range.start, va.range.end, cpu),
            Backing::Blob(_, page) => (va.range.start, va.range.end, page),
        })
        .collect()
}
fn zaps(change: &Change) -> Vec<(u64, u64)> {
    let mut zapped = Vec::new();
    change.zapped(|r| zapped.push((r.start, r.end)));
    zapped
}

#[test]
fn map_inside_splits_in_two() {
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(userptr(0, 10, 100), &mut Change::default());
    m.map(userptr(3, 5, 900), &mut change);
    assert_eq!(shape(&m), [(0, 3, 100), (3, 5, 900), (5, 10, 105)]);
    assert_eq!(zaps(&change), [(3, 5)]);
}

#[test]
fn map_over_edges_cuts_both() {
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(userptr(0, 10, 100), &mut Change::default());
    m.map(userptr(10, 12, 300), &mut Change::default());
    m.map(userptr(12, 20, 200), &mut Change::default());
    m.map(userptr(8, 14, 900), &mut change);
    assert_eq!(shape(&m), [(0, 8, 100), (8, 14, 900), (14, 20, 202)]);
    assert_eq!(zaps(&change), [(8, 10), (10, 12), (12, 14)]);
}

#[test]
fn same_object_contiguous_keeps_its_translations() {
    let bo = Arc::new(Blob::for_test(64));
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(blob(10, 20, &bo, 5), &mut Change::default());
    m.map(blob(8, 30, &bo, 3), &mut change);
    assert_eq!(zaps(&change), []);
    let mut moved = Change::default();
    m.map(blob(8, 30, &bo, 4), &mut moved);
    assert_eq!(zaps(&moved), [(8, 30)]);
}

#[test]
fn readonly_change_zaps_even_the_same_object() {
    let bo = Arc::new(Blob::for_test(64));
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(blob(0, 4, &bo, 0), &mut Change::default());
    m.map(GpuVa { readonly: true, ..blob(0, 4, &bo, 0) }, &mut change);
    assert_eq!(zaps(&change), [(0, 4)]);
}

#[test]
fn cpu_range_is_shown_at_its_gpu_range() {
    let va = userptr(50, 60, 100);
    assert_eq!(va.showing(range(95, 103)), Some(range(50, 53)));
    assert_eq!(va.showing(range(109, 200)), Some(range(59, 60)));
    assert_eq!(va.showing(range(110, 200)), None);
}

/// Random maps and unmaps against a page-by-page model; every change is also undone and done again.
#[test]
fn agrees_with_a_page_map() {
    let seed = std::env::var("SVM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0xc0ffee_u64);
    println!("seed {seed} (set SVM_SEED to repeat)");
    let mut x = seed | 1;
    let mut next = move |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    };
    let (mut m, mut model): (Mappings, HashMap<u64, u64>) = Default::default();
    for _ in 0..20_000 {
        let (start, pages, cpu) = (next(60), 1 + next(20), 1000 + next(1000));
        let (before, unmap) = (shape(&m), next(3) == 0);
        let apply = |m: &mut Mappings| {
            let mut change = Change::default();
            if unmap {
                m.unmap(range(start, start + pages), &mut change);
            } else {
                m.map(userptr(start, start + pages, cpu), &mut change);
            }
            change
        };
        let change = apply(&mut m);
        m.undo(change);
        assert_eq!(shape(&m), before);
        let change = apply(&mut m);
        let zapped = zaps(&change);
        for n in 0..pages {
            let page = start + n;
            let was = if unmap { model.remove(&page) } else { model.insert(page, cpu + n) };
            let gone = zapped.iter().any(|(s, e)| (*s..*e).contains(&page));
            assert_eq!(was.is_some(), gone, "page {page}");
        }
        for page in 0..80 {
            let found = m.find(page).map(|va| match va.backing_at(page) {
                Backing::Userptr(cpu) => cpu,
                Backing::Blob(..) => unreachable!(),
            });
            assert_eq!(found, model.get(&page).copied());
        }
    }
}
