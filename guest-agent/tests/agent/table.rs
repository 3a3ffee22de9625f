//! The table of arenas against a model that knows every page by itself.

use crate::virtqueue::Random;
use guest_agent::agent::{Arena, ArenaTable, Error, Withdrawal};
use std::collections::{BTreeMap, BTreeSet};

const PAGE: u64 = 4096;
/// Pages of address space that the test plays in.
const SPACE: u64 = 96;
const MAX_PARTS: usize = 24;

/// A page of an arena that has not gone yet.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    arena: u64,
    gpa: u64,
    leaving: Option<u64>,
}

#[derive(Default)]
struct Model {
    pages: BTreeMap<u64, Place>,
    /// First page, pages, of each arena.
    arenas: BTreeMap<u64, (u64, u64)>,
}

impl Model {
    fn parts(&self) -> usize {
        let starts = |(page, place): (&u64, &Place)| {
            let before = page.checked_sub(1).and_then(|before| self.pages.get(&before));
            before.is_none_or(|before| (before.arena, before.leaving) != (place.arena, place.leaving))
        };
        self.pages.iter().filter(|entry| starts(*entry)).count()
    }

    fn staying(&self, arena: u64) -> BTreeSet<u64> {
        let stays = |place: &Place| place.arena == arena && place.leaving.is_none();
        self.pages.iter().filter(|(_, place)| stays(place)).map(|(page, _)| *page).collect()
    }

    fn mark(&mut self, pages: impl IntoIterator<Item = u64>, number: u64) {
        for page in pages {
            self.pages.get_mut(&page).unwrap().leaving = Some(number);
        }
    }

    /// Removes a withdrawal's pages; the arena of which none is left.
    fn remove(&mut self, number: u64) -> Option<u64> {
        let arena = self.pages.values().find(|place| place.leaving == Some(number))?.arena;
        self.pages.retain(|_, place| place.leaving != Some(number));
        let gone = self.pages.values().all(|place| place.arena != arena);
        gone.then(|| self.arenas.remove(&arena).map(|_| arena)).flatten()
    }
}

struct Played {
    random: Random,
    table: ArenaTable,
    model: Model,
    under_way: Vec<(u64, Withdrawal)>,
    next: u64,
}

impl Played {
    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn insert(&mut self) {
        let (first, count, id) = (1 + self.random.below(SPACE), 1 + self.random.below(16), self.next());
        let places: Vec<u64> = (0..count).map(|n| (id * 1000 + n * 2) * PAGE).collect();
        let arena = Arena {
            id,
            uid: 0,
            va: first * PAGE,
            len: count * PAGE,
            pages: places.iter().copied().collect(),
        };
        let free = (first..first + count).all(|page| !self.model.pages.contains_key(&page));
        assert_eq!(self.table.insert(arena).is_ok(), free, "arena {id} at page {first}");
        if free {
            let leaving = None;
            let pages =
                places.iter().zip(first..).map(|(&gpa, page)| (page, Place { arena: id, gpa, leaving }));
            self.model.pages.extend(pages);
            self.model.arenas.insert(id, (first, count));
        }
    }

    fn any_arena(&mut self) -> u64 {
        let known = self.model.arenas.len() as u64;
        let index = self.random.below(known + 1) as usize;
        self.model.arenas.keys().nth(index).copied().unwrap_or(u64::MAX)
    }

    fn withdraw(&mut self) {
        let (id, number) = (self.any_arena(), self.next());
        let staying = self.model.staying(id);
        let withdrawn = self.table.withdraw(number, id);
        assert_eq!(withdrawn.is_ok(), !staying.is_empty(), "arena {id}");
        if let Ok(withdrawn) = withdrawn {
            let pages = withdrawn.ranges.iter().flat_map(|(va, len)| va / PAGE..(va + len) / PAGE);
            assert_eq!(pages.collect::<Vec<u64>>(), staying.iter().copied().collect::<Vec<u64>>());
            let apart = withdrawn.ranges.is_sorted_by(|(va, len), (next, _)| va + len < *next);
            assert!(apart, "one for each run: {withdrawn:?}");
            self.model.mark(staying, number);
            self.under_way.push((number, withdrawn));
        }
    }

    fn cut(&mut self) {
        let (id, number) = (self.any_arena(), self.next());
        let (offset, count) = (self.random.below(17), self.random.below(8));
        let cut = self.table.withdraw_part(number, id, (offset * PAGE, count * PAGE), MAX_PARTS);
        let Some(&(first, len)) = self.model.arenas.get(&id) else {
            assert!(matches!(cut, Err(Error::NoArena(_))));
            return;
        };
        if count == 0 || offset + count > len {
            assert!(matches!(cut, Err(Error::BadRange { .. })));
            return;
        }
        let pages: Vec<u64> = (first + offset..first + offset + count).collect();
        let staying = self.model.staying(id);
        if !pages.iter().all(|page| staying.contains(page)) {
            assert!(matches!(cut, Err(Error::CutBefore { .. })), "{cut:?}");
            return;
        }
        let before: Vec<_> = pages.iter().map(|page| (*page, self.model.pages[page])).collect();
        self.model.mark(pages.iter().copied(), number);
        match cut {
            Ok(withdrawn) => {
                assert_eq!(withdrawn.ranges, [(pages[0] * PAGE, count * PAGE)]);
                self.under_way.push((number, withdrawn));
            }
            Err(Error::TooMany { limit, .. }) => {
                assert!(self.model.parts() > limit);
                self.model.pages.extend(before);
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn remove(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let index = self.random.below(self.under_way.len() as u64) as usize;
        let (number, withdrawn) = self.under_way.swap_remove(index);
        let gone = self.table.remove(&withdrawn).map(|arena| arena.id);
        assert_eq!(gone, self.model.remove(number));
        assert!(self.table.remove(&withdrawn).is_none(), "removed twice");
    }

    fn compare(&mut self) {
        assert_eq!(self.table.num_parts(), self.model.parts());
        assert!(self.table.num_parts() <= MAX_PARTS + self.model.arenas.len());
        assert_eq!(self.table.len(), self.model.arenas.len());
        let pinned: u64 = self.model.arenas.values().map(|(_, count)| count * PAGE).sum();
        assert_eq!(self.table.bytes(), pinned);
        for page in 0..SPACE + 20 {
            let here = self.model.pages.get(&page);
            assert_eq!(self.table.overlaps(page * PAGE, PAGE), here.is_some(), "page {page}");
            let window = 1 << self.random.below(6);
            let runs = self.table.window(page * PAGE..page * PAGE + 1, window).runs(0);
            let told: BTreeMap<u64, u64> =
                runs.iter().map(|run| (run.va.get() / PAGE, run.gpa.get())).collect();
            assert_eq!(told.contains_key(&page), here.is_some_and(|place| place.leaving.is_none()));
            let first = page - page % u64::from(window);
            for (told, gpa) in told {
                let place = self.model.pages[&told];
                assert_eq!((Some(place.arena), place.leaving), (here.map(|here| here.arena), None));
                assert_eq!(place.gpa, gpa);
                assert!((first..first + u64::from(window)).contains(&told));
            }
        }
    }
}

/// Arenas come, are cut into parts, and go, in any order; the table is as a map of single pages would be.
#[test]
fn table_is_as_a_map_of_pages() {
    let random = Random::seeded();
    let (table, model) = (ArenaTable::default(), Model::default());
    let mut played = Played { random, table, model, under_way: Vec::new(), next: 0 };
    for _ in 0..6000 {
        match played.random.below(10) {
            0..3 => played.insert(),
            3..7 => played.cut(),
            7 => played.withdraw(),
            _ => played.remove(),
        }
        played.compare();
    }
    let mut all: Vec<u64> = played.table.take_all().into_iter().map(|arena| arena.id).collect();
    all.sort_unstable();
    assert_eq!(all, played.model.arenas.into_keys().collect::<Vec<_>>());
    assert!(played.table.is_empty() && !played.table.overlaps(0, u64::MAX));
}
