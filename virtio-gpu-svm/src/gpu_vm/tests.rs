use super::*;
use crate::random;
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
        .map(|va| match va.behind(va.range.start) {
            Behind::Cpu(page) | Behind::Blob(_, page) => (va.range.start, va.range.end, page),
            Behind::Null => (va.range.start, va.range.end, u64::MAX),
        })
        .collect()
}
fn zaps(change: &Change) -> Vec<(u64, u64)> {
    let mut zapped = Vec::new();
    change.zapped(|r| zapped.push((r.start, r.end)));
    zapped
}

/// Objects a, b and c of the drawings; their numbers are their resource ids.
fn objects() -> [Arc<Blob>; 3] {
    [1, 2, 3].map(|id| Arc::new(Blob::new(id, std::iter::once((1000, 64)))))
}
/// (start, end, object, first page of it), all in pages.
type Drawn = (u64, u64, usize, u64);

fn drawn(objects: &[Arc<Blob>; 3], (start, end, object, page): Drawn) -> GpuVa {
    blob(start, end, &objects[object], page)
}
fn drawing(mappings: &Mappings) -> Vec<Drawn> {
    let one = |va: &GpuVa| match va.behind(va.range.start) {
        Behind::Blob(blob, page) => (va.range.start, va.range.end, blob.resource_id as usize - 1, page),
        Behind::Cpu(page) => (va.range.start, va.range.end, usize::MAX, page),
        Behind::Null => (va.range.start, va.range.end, usize::MAX, u64::MAX),
    };
    mappings.iter().map(one).collect()
}

const A: usize = 0;
const B: usize = 1;

/// One drawing: `old` is there, `req` is mapped, `new` must come out; `kept` says whether translations may stay. What
/// is zapped otherwise is what both have. Then it is undone.
fn case(old: Drawn, req: Drawn, new: &[Drawn], kept: bool) {
    let objects = objects();
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(drawn(&objects, old), &mut Change::default());
    m.map(drawn(&objects, req), &mut change);
    assert_eq!(drawing(&m), new);
    let both = (old.0.max(req.0), old.1.min(req.1));
    assert_eq!(zaps(&change), if kept { vec![] } else { vec![both] });
    let covered = req.0 <= old.0 && old.1 <= req.1;
    let step =
        matches!((&change.steps[0], covered), (SmStep::Unmap { .. }, true) | (SmStep::Remap { .. }, false));
    assert!(step && matches!(change.steps[1], SmStep::Map(_)) && change.steps.len() == 2, "{change:?}");
    m.undo(change);
    assert_eq!(drawing(&m), [old]);
}

#[test]
fn case_01_identical_is_kept() {
    case((0, 1, A, 5), (0, 1, A, 5), &[(0, 1, A, 5)], true);
}

#[test]
fn case_02_other_offset_replaces() {
    case((0, 1, A, 5), (0, 1, A, 9), &[(0, 1, A, 9)], false);
}

#[test]
fn case_03_other_object_replaces() {
    case((0, 1, A, 5), (0, 1, B, 5), &[(0, 1, B, 5)], false);
}

#[test]
fn case_04_left_aligned_subset_is_replaced() {
    case((0, 1, A, 5), (0, 2, A, 5), &[(0, 2, A, 5)], true);
    case((0, 1, A, 5), (0, 2, A, 6), &[(0, 2, A, 6)], false);
    case((0, 1, A, 5), (0, 2, B, 5), &[(0, 2, B, 5)], false);
}

#[test]
fn case_05_left_aligned_request_of_another_object_splits() {
    case((0, 2, A, 5), (0, 1, B, 5), &[(0, 1, B, 5), (1, 2, A, 6)], false);
    case((0, 2, A, 5), (0, 1, A, 9), &[(0, 1, A, 9), (1, 2, A, 6)], false);
}

#[test]
fn case_06_left_aligned_request_of_the_same_is_kept() {
    case((0, 2, A, 5), (0, 1, A, 5), &[(0, 1, A, 5), (1, 2, A, 6)], true);
}

#[test]
fn case_07_right_aligned_request_of_another_object_splits() {
    case((0, 2, A, 5), (1, 2, B, 8), &[(0, 1, A, 5), (1, 2, B, 8)], false);
}

#[test]
fn case_08_right_aligned_request_of_the_same_is_kept() {
    case((0, 2, A, 5), (1, 2, A, 6), &[(0, 1, A, 5), (1, 2, A, 6)], true);
}

#[test]
fn case_09_overlap_at_the_end_cuts() {
    case((0, 2, A, 5), (1, 3, B, 8), &[(0, 1, A, 5), (1, 3, B, 8)], false);
}

#[test]
fn case_10_contiguous_overlap_at_the_end_is_kept() {
    case((0, 2, A, 5), (1, 3, A, 6), &[(0, 1, A, 5), (1, 3, A, 6)], true);
}

#[test]
fn case_11_centred_request_of_another_object_splits_in_two() {
    case((0, 3, A, 5), (1, 2, B, 8), &[(0, 1, A, 5), (1, 2, B, 8), (2, 3, A, 7)], false);
}

#[test]
fn case_12_centred_request_of_the_same_is_kept() {
    case((0, 3, A, 5), (1, 2, A, 6), &[(0, 1, A, 5), (1, 2, A, 6), (2, 3, A, 7)], true);
}

#[test]
fn case_13_right_aligned_subset_is_replaced() {
    case((1, 2, A, 6), (0, 2, A, 5), &[(0, 2, A, 5)], true);
    case((1, 2, A, 6), (0, 2, B, 5), &[(0, 2, B, 5)], false);
}

#[test]
fn case_14_centred_subset_is_replaced() {
    case((1, 2, A, 6), (0, 3, A, 5), &[(0, 3, A, 5)], true);
    case((1, 2, A, 6), (0, 3, A, 4), &[(0, 3, A, 4)], false);
}

#[test]
fn case_15_overlap_at_the_beginning_cuts() {
    case((1, 3, A, 5), (0, 2, B, 8), &[(0, 2, B, 8), (2, 3, A, 6)], false);
}

/// Object-less mappings `old`, split at a range: `new` must come out, in this many steps, with every translation kept.
fn advice(old: &[(u64, u64, u64)], edges: (u64, u64), new: &[(u64, u64, u64)], steps: usize) {
    let (mut m, mut change) = (Mappings::default(), Change::default());
    for (start, end, cpu) in old {
        m.map(userptr(*start, *end, *cpu), &mut Change::default());
    }
    m.split(range(edges.0, edges.1), &mut change);
    assert_eq!((shape(&m).as_slice(), change.steps.len()), (new, steps));
    assert_eq!(zaps(&change), []);
    m.undo(change);
    assert_eq!(shape(&m), old);
}

#[test]
fn case_16_advice_within_one_mapping_splits_it_in_three() {
    advice(&[(0, 9, 100)], (3, 6), &[(0, 3, 100), (3, 6, 103), (6, 9, 106)], 2);
}

#[test]
fn case_17_advice_over_several_splits_the_first_and_the_last() {
    let old = [(0, 4, 100), (4, 8, 200), (8, 12, 300)];
    let new = [(0, 2, 100), (2, 4, 102), (4, 8, 200), (8, 10, 300), (10, 12, 302)];
    advice(&old, (2, 10), &new, 4);
}

#[test]
fn case_18_advice_with_one_edge_inside_splits_once() {
    let old = [(0, 4, 100), (4, 8, 200), (8, 12, 300)];
    advice(&old, (0, 10), &[(0, 4, 100), (4, 8, 200), (8, 10, 300), (10, 12, 302)], 2);
    advice(&old, (2, 12), &[(0, 2, 100), (2, 4, 102), (4, 8, 200), (8, 12, 300)], 2);
}

#[test]
fn case_19_advice_at_the_edges_does_nothing() {
    advice(&[(0, 4, 100), (4, 8, 200)], (0, 8), &[(0, 4, 100), (4, 8, 200)], 0);
}

#[test]
fn case_20_advice_about_nothing_does_nothing() {
    advice(&[], (0, 8), &[], 0);
}

#[test]
fn advice_passes_over_mappings_with_an_object() {
    let objects = objects();
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(drawn(&objects, (0, 9, A, 5)), &mut Change::default());
    m.split(range(3, 6), &mut change);
    assert_eq!((drawing(&m).as_slice(), change.steps.len()), ([(0, 9, A, 5)].as_slice(), 0));
}

#[test]
fn map_over_several_cuts_both_edges_and_unmaps_the_middle() {
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(userptr(0, 10, 100), &mut Change::default());
    m.map(userptr(10, 12, 300), &mut Change::default());
    m.map(userptr(12, 20, 200), &mut Change::default());
    m.map(userptr(8, 14, 900), &mut change);
    assert_eq!(shape(&m), [(0, 8, 100), (8, 14, 900), (14, 20, 202)]);
    assert_eq!(zaps(&change), [(8, 10), (10, 12), (12, 14)]);
}

#[test]
fn readonly_change_zaps_even_the_same_object() {
    let [bo, ..] = objects();
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(blob(0, 4, &bo, 0), &mut Change::default());
    m.map(GpuVa { readonly: true, ..blob(0, 4, &bo, 0) }, &mut change);
    assert_eq!(zaps(&change), [(0, 4)]);
}

#[test]
fn cpu_range_is_found_in_all_mappings_that_show_it() {
    let (mut m, mut change) = (Mappings::default(), Change::default());
    m.map(userptr(50, 60, 100), &mut change);
    m.map(userptr(200, 201, 102), &mut change);
    m.map(GpuVa { range: range(300, 700), backing: Backing::Mirror(-250), readonly: false }, &mut change);
    let showing = |start, end| {
        let mut found = m.showing(range(start, end));
        found.sort_unstable();
        found
    };
    assert_eq!(showing(95, 103), [range(50, 53), range(200, 201), range(345, 353)]);
    assert_eq!(showing(109, 120), [range(59, 60), range(359, 370)]);
    assert_eq!(showing(449, 1 << 40), [range(699, 700)]);
    assert_eq!((showing(450, 1 << 40), showing(0, 50)), (vec![], vec![]));
    m.undo(change);
    assert_eq!(m.showing(range(0, u64::MAX)), []);
}

/// Random maps, unmaps and splits against a page-by-page model, three seeds; every change is also undone and done
/// again. `SVM_SEED` repeats one seed, `SVM_OPS` sets the operations of each (the long version has 1,000,000).
#[test]
fn agrees_with_a_page_map() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number("SVM_SEED").map_or(vec![1, 2, 3], |seed| vec![seed]);
    for seed in seeds {
        println!("seed {seed} (set SVM_SEED to repeat)");
        compare_with_a_page_map(seed, number("SVM_OPS").unwrap_or(100_000));
    }
}

fn compare_with_a_page_map(seed: u64, operations: u64) {
    let mut next = random::numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let blobs = objects();
    // What stands behind a page: 0 the CPU's, n blob n, 9 nothing; and which page of it.
    let behind = |va: &GpuVa, page: u64| match va.behind(page) {
        Behind::Cpu(cpu) => (0, cpu),
        Behind::Blob(blob, at) => (u64::from(blob.resource_id), at),
        Behind::Null => (9, 0),
    };
    let (mut m, mut model): (Mappings, HashMap<u64, (u64, u64)>) = Default::default();
    for _ in 0..operations {
        let (start, pages, cpu, what) = (next(60), 1 + next(20), 1000 + next(1000), next(9));
        let backing = match what {
            3 => Backing::Mirror(cpu.cast_signed()),
            4 => Backing::Null,
            5 | 6 => Backing::Blob(Arc::clone(&blobs[(next(3) % 3) as usize]), start + next(2) * 7),
            _ => Backing::Userptr(cpu),
        };
        let request = GpuVa { range: range(start, start + pages), backing, readonly: false };
        let before = shape(&m);
        let apply = |m: &mut Mappings| {
            let mut change = Change::default();
            match what {
                0 | 1 => m.unmap(range(start, start + pages), &mut change),
                2 => m.split(range(start, start + pages), &mut change),
                _ => m.map(request.clone(), &mut change),
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
            let is = behind(&request, page);
            let was = match what {
                0 | 1 => model.remove(&page),
                2 => None,
                _ => model.insert(page, is),
            };
            // Translations may stay only where the same page of the same object is mapped again.
            let kept = what > 2 && was == Some(is) && matches!(is.0, 1..=3);
            let gone = zapped.iter().any(|(s, e)| (*s..*e).contains(&page));
            assert_eq!(was.is_some() && !kept, gone, "page {page}");
        }
        let first = 900 + next(1300);
        let asked = range(first, first + 1 + next(200));
        let mut showing: Vec<u64> =
            m.showing(asked).iter().flat_map(|shown| shown.start..shown.end).collect();
        showing.sort_unstable();
        let shows = |(page, is): (&u64, &(u64, u64))| (is.0 == 0 && asked.contains(is.1)).then_some(*page);
        let mut expected: Vec<u64> = model.iter().filter_map(shows).collect();
        expected.sort_unstable();
        assert_eq!(showing, expected, "CPU pages {asked:?}");
        for page in 0..80 {
            assert_eq!(m.find(page).map(|va| behind(va, page)), model.get(&page).copied());
        }
    }
}
