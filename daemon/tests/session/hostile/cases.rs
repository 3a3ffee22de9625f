//! The cases. Those of a section vary one thing each; the rest is as a good driver does it.

use super::driver::*;
use super::{CURSORQ, EVENTQ, good_chain};
use rustix::event::epoll;
use rustix::fs::{MemfdFlags, memfd_create};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// What a case must lead to on one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// So many chains come back with an answer or a record.
    Answered(usize),
    /// So many chains come back with nothing in them, as there was no room.
    Empty(usize),
    /// So many chains come back unread, and are counted.
    GivenBack(usize),
    /// The ring fails.
    Latched,
    /// Nothing: the ring is not served, or there is nothing to serve.
    Nothing,
    /// The session ends.
    Ended,
}

use Want::{Answered, Empty, Ended, GivenBack, Latched, Nothing};

type SetUp = Box<dyn Fn(&mut Hostile, usize) -> Outcome>;
type Move = fn(Place, u64) -> Place;
type LieOn = fn(Place, Place) -> Place;
type Act = Box<dyn Fn(&mut Hostile, usize)>;

pub struct Case {
    pub name: String,
    /// The queue's ring does not run before.
    pub untouched: bool,
    /// Another queue of the guest suffers too.
    pub spoils_all: bool,
    pub set_up: SetUp,
    pub act: Act,
    /// By queue.
    pub wants: [Want; 3],
}

fn case(name: impl Into<String>, wants: [Want; 3], act: impl Fn(&mut Hostile, usize) + 'static) -> Case {
    let (set_up, act): (SetUp, Act) = (Box::new(|_, _| Ok(())), Box::new(act));
    Case { name: name.into(), untouched: false, spoils_all: false, set_up, act, wants }
}

const GOOD: [Want; 3] = [Answered(1); 3];
const REFUSED: [Want; 3] = [GivenBack(1); 3];
const NO_ROOM: [Want; 3] = [Empty(1); 3];
/// A command is answered, but no record fits.
const NO_RECORD: [Want; 3] = [Answered(1), Answered(1), Empty(1)];
/// More descriptors than an event buffer may have.
const TOO_LONG_FOR_EVENTS: [Want; 3] = [Answered(1), Answered(1), GivenBack(1)];

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(buffers());
    cases.extend(chains());
    cases.extend(long_chains());
    cases.extend(indirect());
    cases.extend(indices());
    cases.extend(sizes());
    cases.extend(places());
    cases.extend(overlaps());
    cases.extend(kick_files());
    cases.extend(call_files());
    cases.extend(starts());
    cases.extend(while_running());
    cases
}

/// A chain of these descriptors, from 0 on.
fn chain(name: impl Into<String>, wants: [Want; 3], descs: &[Desc]) -> Case {
    let descs = descs.to_vec();
    case(name, wants, move |hostile, queue| {
        hostile.describe(hostile.place(queue).desc, &descs);
        hostile.publish(queue, 0);
    })
}

/// Where a buffer is, and whether it can be there.
fn buffers() -> Vec<Case> {
    let places = [
        ("length 2^32 - 1", COMMAND, u32::MAX),
        ("in a hole", HOLE, 64),
        ("beyond all memory", END, 64),
        ("far beyond all memory", 1 << 60, 64),
        ("in a place of devices", 0xfee0_0000, 64),
        ("that wraps", u64::MAX - 7, 16),
        ("at the last address", u64::MAX, 1),
        ("that ends at 2^64", u64::MAX - 15, 16),
        ("that runs into a hole", HOLE - 16, 32),
        ("from a hole into memory", HOLE_END - 16, 32),
        ("that runs out of memory", END - 16, 32),
        ("over a hole", HOLE - 16, (HOLE_END - HOLE) as u32 + 32),
    ];
    let mut cases = Vec::new();
    for (what, addr, len) in places {
        let read = [(addr, len, NEXT, 1), (ANSWER, 4096, WRITE, 0)];
        let write = [(COMMAND, 24, NEXT, 1), (addr, len, WRITE, 0)];
        cases.push(chain(format!("command {what}"), REFUSED, &read));
        cases.push(chain(format!("answer {what}"), REFUSED, &write));
    }
    let command = |addr, len| [(addr, len, NEXT, 1), (ANSWER, 4096, WRITE, 0)];
    let answer = |addr, len| [(COMMAND, 24, NEXT, 1), (addr, len, WRITE, 0)];
    cases.push(chain("command of no bytes", GOOD, &command(COMMAND, 0)));
    cases.push(chain("command of no bytes in a hole", GOOD, &command(HOLE, 0)));
    cases.push(chain("command at 0", GOOD, &command(0, 24)));
    cases.push(chain("command across two regions", GOOD, &command(MIB - 12, 24)));
    cases.push(chain("command in the last bytes before a hole", GOOD, &command(HOLE - 24, 24)));
    cases.push(chain("command of two whole regions", GOOD, &command(0, (2 * MIB) as u32)));
    cases.push(chain("answer at 0", GOOD, &answer(0, 4096)));
    cases.push(chain("answer across two regions", GOOD, &answer(MIB - 12, 4096)));
    cases.push(chain("answer in the last byte of memory", NO_RECORD, &answer(END - 1, 1)));
    for (room, wants) in [(0, NO_ROOM), (1, NO_RECORD), (23, NO_RECORD), (24, NO_RECORD), (119, NO_RECORD)] {
        cases.push(chain(format!("answer of {room} bytes"), wants, &answer(ANSWER, room)));
    }
    cases.push(chain("answer of 120 bytes", GOOD, &answer(ANSWER, 120)));
    cases.push(chain("answer over its command", GOOD, &answer(COMMAND, 4096)));
    cases
}

/// The order of descriptors and their flags.
fn chains() -> Vec<Case> {
    let (read, write) = ((COMMAND, 24), (ANSWER, 4096));
    let r = |flags: u16, next: u16| (read.0, read.1, flags, next);
    let w = |flags: u16, next: u16| (write.0, write.1, WRITE | flags, next);
    let mut cases = vec![
        chain("nothing to read", GOOD, &[w(0, 0)]),
        chain("nothing to write", NO_ROOM, &[r(0, 0)]),
        chain("neither", NO_ROOM, &[(0, 0, 0, 0)]),
        chain("neither, in two", NO_ROOM, &[(0, 0, NEXT, 1), (0, 0, WRITE, 0)]),
        chain("readable behind writable", REFUSED, &[w(NEXT, 1), r(0, 0)]),
        chain("readable behind empty writable", REFUSED, &[(ANSWER, 0, WRITE | NEXT, 1), r(0, 0)]),
        chain("readable between writable", REFUSED, &[w(NEXT, 1), r(NEXT, 2), w(0, 0)]),
        chain("next = size", REFUSED, &[r(NEXT, SIZE)]),
        chain("next = 2^16 - 1", REFUSED, &[r(NEXT, u16::MAX)]),
        chain("itself", REFUSED, &[r(NEXT, 0)]),
        chain("itself, writable", REFUSED, &[w(NEXT, 0)]),
        chain("itself, empty", REFUSED, &[(0, 0, NEXT, 0)]),
        chain("circle of two", REFUSED, &[r(NEXT, 1), r(NEXT, 0)]),
        chain("circle that the head is not in", REFUSED, &[r(NEXT, 1), r(NEXT, 2), w(NEXT, 1)]),
        chain("reserved flags", GOOD, &[r(NEXT | 0xfff8, 1), w(0xfff8, 0)]),
    ];
    let all: Vec<Desc> = (0..SIZE).map(|i| r(NEXT, (i + 1) % SIZE)).collect();
    cases.push(chain("circle of the whole table", REFUSED, &all));
    let mut whole = all.clone();
    whole[usize::from(SIZE) - 1] = w(0, 0);
    cases.push(chain("as long as the table", GOOD, &whole));
    let mut crumbs: Vec<Desc> = (1..SIZE).map(|i| (ANSWER + u64::from(i), 1, WRITE | NEXT, i + 1)).collect();
    crumbs[usize::from(SIZE) - 2].2 = WRITE;
    crumbs.insert(0, r(NEXT, 1));
    cases.push(chain("answer in single bytes", NO_RECORD, &crumbs));
    for (what, part) in [("descriptors", 0), ("slots", 1)] {
        cases.push(case(format!("command is the ring's own {what}"), GOOD, move |hostile, queue| {
            let place = hostile.place(queue);
            let at = [place.desc, place.avail][part];
            hostile.describe(place.desc, &[(at, 24, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
            hostile.publish(queue, 0);
        }));
    }
    // What is written there says that something else is available.
    cases.push(over_ring("slots", |place| place.avail, [Latched, Latched, Answered(1)]));
    cases.push(over_ring("descriptors", |place| place.desc, GOOD));
    cases.push(over_ring("used ring", |place| place.used + 0x100, GOOD));
    cases
}

fn over_ring(what: &str, at: fn(Place) -> u64, wants: [Want; 3]) -> Case {
    case(format!("answer over the ring's own {what}"), wants, move |hostile, queue| {
        let place = hostile.place(queue);
        hostile.describe(place.desc, &[(COMMAND, 24, NEXT, 1), (at(place), 4096, WRITE, 0)]);
        hostile.publish(queue, 0);
    })
}

/// A table at [`TABLE`], and the descriptor that names it.
fn table(name: impl Into<String>, wants: [Want; 3], head: Desc, entries: &[Desc]) -> Case {
    let entries = entries.to_vec();
    case(name, wants, move |hostile, queue| {
        hostile.describe(TABLE, &entries);
        hostile.describe(hostile.place(queue).desc, &[head]);
        hostile.publish(queue, 0);
    })
}

/// So many descriptors: pieces of a command, and room for its answer.
fn long(count: u32, piece: u32) -> Vec<Desc> {
    let mut descs: Vec<Desc> =
        (1..count).map(|i| (COMMAND + u64::from(i % 4096), piece, NEXT, i as u16)).collect();
    descs.push((ANSWER, 4096, WRITE, 0));
    descs
}

fn long_chains() -> Vec<Case> {
    let wants = |count: u32, piece: u32| match count {
        0..=64 => GOOD,
        _ if count > 16_384 || piece == 1 && count > 1024 => REFUSED,
        _ => TOO_LONG_FOR_EVENTS,
    };
    let mut cases = Vec::new();
    for piece in [0, 1, 4096] {
        for count in [64, 65, 1024, 1025, 16_384, 16_385] {
            let (head, entries) = ((TABLE, count * 16, INDIRECT, 0), long(count, piece));
            let name = format!("{count} descriptors of {piece} bytes");
            cases.push(table(name, wants(count, piece), head, &entries));
        }
    }
    // Commands of many bytes end a visit by those, commands of none by their descriptors.
    for piece in [0, 4096] {
        let longest = long(16_384, piece);
        cases.push(case(
            format!("the longest chain of {piece} bytes each, as often as there is room"),
            [Answered(16), Answered(16), GivenBack(16)],
            move |hostile, queue| {
                hostile.describe(TABLE, &longest);
                hostile.describe(hostile.place(queue).desc, &[(TABLE, 16_384 * 16, INDIRECT, 0)]);
                (0..SIZE).for_each(|_| hostile.publish(queue, 0));
            },
        ));
    }
    let direct = long(257, 1);
    let mut chain =
        case("257 descriptors of the ring's own table", TOO_LONG_FOR_EVENTS, move |hostile, queue| {
            hostile.describe(hostile.place(queue).desc, &direct);
            hostile.publish(queue, 0);
        });
    chain.set_up = placed(|place| Place { size: 512, ..place });
    cases.push(chain);
    cases
}

fn indirect() -> Vec<Case> {
    let good = good_chain();
    let head = |len: u32| (TABLE, len, INDIRECT, 0);
    let nested = (TABLE + 0x1000, 32, INDIRECT, 0);
    let mut cases = vec![
        table("indirect", GOOD, head(32), &good),
        table("indirect, and writable", GOOD, (TABLE, 32, INDIRECT | WRITE, 0), &good),
        table("indirect, and more", REFUSED, (TABLE, 32, INDIRECT | NEXT, 1), &good),
        table("indirect within indirect", REFUSED, head(16), &[nested]),
        table(
            "indirect behind another within indirect",
            REFUSED,
            head(32),
            &[(COMMAND, 24, NEXT, 1), nested],
        ),
        table("table not aligned", GOOD, (TABLE + 1, 32, INDIRECT, 0), &[]),
        table("entry beyond the table", REFUSED, head(16), &good),
        table("entry 2^16 - 1", REFUSED, head(32), &[(COMMAND, 24, NEXT, u16::MAX)]),
        table("entry itself", REFUSED, head(32), &[(COMMAND, 24, NEXT, 0)]),
        table("entry itself, empty", REFUSED, head(32), &[(0, 0, NEXT, 0)]),
        table("circle of entries", REFUSED, head(32), &[(COMMAND, 24, NEXT, 1), (COMMAND, 24, NEXT, 0)]),
        table(
            "readable entry behind writable",
            REFUSED,
            head(32),
            &[(ANSWER, 64, WRITE | NEXT, 1), (COMMAND, 24, 0, 0)],
        ),
        table("entry in a hole", REFUSED, head(32), &[(HOLE, 24, NEXT, 1), good[1]]),
        table("table in a hole", REFUSED, (HOLE, 32, INDIRECT, 0), &good),
        table("table beyond all memory", REFUSED, (END, 32, INDIRECT, 0), &good),
        table("table that wraps", REFUSED, (u64::MAX - 15, 32, INDIRECT, 0), &good),
        table("table that runs into a hole", REFUSED, (HOLE - 16, 32, INDIRECT, 0), &good),
    ];
    // Written where the name says it is.
    let misaligned = cases.iter_mut().find(|case| case.name == "table not aligned").unwrap();
    misaligned.act = Box::new(|hostile, queue| {
        hostile.describe(TABLE + 1, &good_chain());
        hostile.describe(hostile.place(queue).desc, &[(TABLE + 1, 32, INDIRECT, 0)]);
        hostile.publish(queue, 0);
    });
    for len in [0, 1, 8, 15, 17, 24, u32::MAX, u32::MAX - 15, 65_535 * 16] {
        cases.push(table(format!("table of {len} bytes"), REFUSED, head(len), &good));
    }
    cases.push(case("table across two regions", GOOD, |hostile, queue| {
        let [command, answer] = good_chain();
        hostile.describe(MIB - 16, &[command]);
        hostile.describe(MIB, &[answer]);
        hostile.describe(hostile.place(queue).desc, &[(MIB - 16, 32, INDIRECT, 0)]);
        hostile.publish(queue, 0);
    }));
    cases.push(case("table is the ring's own", REFUSED, |hostile, queue| {
        let at = hostile.place(queue).desc;
        hostile.describe(at, &[(at, 32, INDIRECT, 0), good_chain()[1]]);
        hostile.publish(queue, 0);
    }));
    cases.push(case("table in the ring's slots", NO_ROOM, |hostile, queue| {
        let place = hostile.place(queue);
        hostile.describe(place.desc, &[(place.avail, 16, INDIRECT, 0)]);
        hostile.publish(queue, 0);
    }));
    cases.push(case("buffer, and a table behind it", GOOD, |hostile, queue| {
        let [command, answer] = good_chain();
        hostile.describe(TABLE, &[answer]);
        hostile.describe(hostile.place(queue).desc, &[command, (TABLE, 16, INDIRECT, 0)]);
        hostile.publish(queue, 0);
    }));
    cases
}

/// Writes a good chain and makes it available.
fn offer(hostile: &mut Hostile, queue: usize) {
    hostile.describe(hostile.place(queue).desc, &good_chain());
    hostile.publish(queue, 0);
}

/// The available ring.
fn indices() -> Vec<Case> {
    let moved = |by: u16| {
        case(format!("index moved by {}", by.cast_signed()), [Latched; 3], move |hostile, queue| {
            hostile.set_avail(queue, hostile.avail(queue).wrapping_add(by));
        })
    };
    let entry = |head: u16| {
        case(format!("head {head}"), [Latched; 3], move |hostile, queue| hostile.publish(queue, head))
    };
    let mut cases: Vec<_> =
        [SIZE + 1, 300, 0x7fff, 0x8000, 0x8001, u16::MAX - 4, u16::MAX].map(moved).into_iter().collect();
    cases.extend([SIZE, SIZE + 1, 0x8000, u16::MAX].map(entry));
    cases.push(case("nothing new", [Nothing; 3], |_, _| ()));
    cases.push(case("the same head twice", [Answered(2), Answered(2), Answered(1)], |hostile, queue| {
        offer(hostile, queue);
        hostile.publish(queue, 0);
    }));
    cases.push(case("one head in all slots", [Answered(16), Answered(16), Answered(1)], |hostile, queue| {
        offer(hostile, queue);
        (1..SIZE).for_each(|_| hostile.publish(queue, 0));
    }));
    cases.push(case("a bad head behind a good one", [Latched, Latched, Answered(1)], |hostile, queue| {
        offer(hostile, queue);
        hostile.publish(queue, SIZE);
    }));
    for (what, value) in [("no interrupts", 1_u16), ("all flags", u16::MAX)] {
        cases.push(case(format!("available ring says {what}"), GOOD, move |hostile, queue| {
            hostile.write(hostile.place(queue).avail, &value.to_le_bytes());
            offer(hostile, queue);
        }));
    }
    cases.push(case("used_event is anything", GOOD, |hostile, queue| {
        hostile.write(hostile.place(queue).avail + 4 + 2 * u64::from(SIZE), &[0xa5; 2]);
        offer(hostile, queue);
    }));
    cases.push(case("used ring is scribbled over", GOOD, |hostile, queue| {
        let place = hostile.place(queue);
        hostile.write(place.used + 4, &[0xa5; 8 * SIZE as usize]);
        offer(hostile, queue);
    }));
    cases
}

/// The ring stops and starts at another place.
fn placed(place: impl Fn(Place) -> Place + 'static) -> SetUp {
    Box::new(move |hostile, queue| {
        hostile.pause(queue);
        hostile.start(queue, place(hostile.place(queue)))
    })
}

fn ring(name: impl Into<String>, wants: [Want; 3], place: impl Fn(Place) -> Place + 'static) -> Case {
    let act: fn(&mut Hostile, usize) = if wants == GOOD { offer } else { |_, _| () };
    let mut case = case(name, wants, act);
    case.set_up = placed(place);
    case
}

fn sizes() -> Vec<Case> {
    let sizes = [
        (0, [Ended; 3]),
        (2, GOOD),
        (3, [Latched; 3]),
        (17, [Latched; 3]),
        (1023, [Latched; 3]),
        (1024, GOOD),
        (1025, [Ended; 3]),
        (2048, [Ended; 3]),
        (32_768, [Ended; 3]),
        (u16::MAX, [Ended; 3]),
    ];
    let mut cases: Vec<_> = sizes
        .into_iter()
        .map(|(size, wants)| ring(format!("ring of {size}"), wants, move |place| Place { size, ..place }))
        .collect();
    let mut one = chain("ring of 1", GOOD, &[(ANSWER, 4096, WRITE, 0)]);
    one.set_up = placed(|place| Place { size: 1, ..place });
    cases.push(one);
    cases
}

fn places() -> Vec<Case> {
    // An area of 256 bytes and more that nothing else uses, and may be moved about.
    let parts: [(&str, Move, u64); 3] = [
        ("descriptors", |place, at| Place { desc: at, ..place }, 8),
        ("slots", |place, at| Place { avail: at, ..place }, 1),
        ("used ring", |place, at| Place { used: at, ..place }, 2),
    ];
    let mut cases = Vec::new();
    for (part, moved, odd) in parts {
        let mut at = |what: &str, wants, at: u64| {
            cases.push(ring(format!("{part} {what}"), wants, move |place| moved(place, at)));
        };
        at("not aligned", [Ended; 3], 0x5_0000 + odd);
        at("in a hole", [Ended; 3], HOLE);
        at("beyond all memory", [Ended; 3], END + 0x1000);
        at("at the last address", [Ended; 3], !0xf - 0x7000_0000_0000);
        at("that run into a hole", [Latched; 3], HOLE - 32);
        at("that run out of memory", [Latched; 3], END - 32);
        at("across two regions", GOOD, MIB - 32);
        at("elsewhere", GOOD, 0x5_0000);
    }
    cases.push(ring("slots at 0", [Latched; 3], |place| Place { avail: 0, ..place }));
    cases.push(ring("descriptors at 0", GOOD, |place| Place { desc: 0, ..place }));
    cases
}

/// The queue whose rings are lain upon.
fn victim(queue: usize) -> usize {
    if queue == CURSORQ { EVENTQ } else { CURSORQ }
}

fn overlaps() -> Vec<Case> {
    let mut cases = vec![
        ring("slots over descriptors", [Latched; 3], |place| Place { avail: place.desc, ..place }),
        ring("used ring over descriptors", [Latched; 3], |place| Place { used: place.desc, ..place }),
        ring("used ring over slots", [Latched; 3], |place| Place { used: place.avail, ..place }),
        ring("used ring over the last descriptor", [Latched; 3], |place| Place {
            used: place.desc + 16 * u64::from(SIZE) - 4,
            ..place
        }),
        ring("used ring over used_event", [Latched; 3], |place| Place {
            used: place.avail + 4 + 2 * u64::from(SIZE),
            ..place
        }),
        ring("slots over avail_event", [Latched; 3], |place| Place {
            avail: place.used + 4 + 8 * u64::from(SIZE),
            ..place
        }),
        ring("slots right behind descriptors", GOOD, |place| Place {
            avail: place.desc + 16 * u64::from(SIZE),
            ..place
        }),
    ];
    let others: [(&str, LieOn, [Want; 3]); 6] = [
        ("used ring over another's used ring", |p, other| Place { used: other.used, ..p }, [Latched; 3]),
        ("used ring over another's slots", |p, other| Place { used: other.avail, ..p }, [Latched; 3]),
        ("used ring over another's descriptors", |p, other| Place { used: other.desc, ..p }, [Latched; 3]),
        ("slots over another's used ring", |p, other| Place { avail: other.used, ..p }, [Latched; 3]),
        ("descriptors over another's used ring", |p, other| Place { desc: other.used, ..p }, [Latched; 3]),
        ("descriptors shared with another", |p, other| Place { desc: other.desc, ..p }, GOOD),
    ];
    for (name, place, wants) in others {
        let mut case = ring(name, wants, |place| place);
        case.set_up = Box::new(move |hostile, queue| {
            let other = hostile.place(victim(queue));
            hostile.pause(queue);
            hostile.start(queue, place(hostile.place(queue), other))
        });
        case.spoils_all = wants != GOOD;
        cases.push(case);
    }
    cases
}

/// A ring that runs anew with what `bring` sends, and a chain that was made available before.
fn with_file(name: &str, wants: [Want; 3], bring: impl Fn(&mut Hostile, usize) + 'static) -> Case {
    let mut case = case(name, wants, |_, _| ());
    case.set_up = Box::new(move |hostile, queue| {
        hostile.pause(queue);
        hostile.set_ring(queue, hostile.place(queue))?;
        offer(hostile, queue);
        bring(hostile, queue);
        hostile.frontend.set_vring_enable(queue, true)
    });
    case
}

fn memfd() -> OwnedFd {
    memfd_create("file", MemfdFlags::CLOEXEC).unwrap()
}

fn kick_files() -> Vec<Case> {
    let kick = |name: &str, wants, bring: fn(&mut Hostile, usize)| {
        with_file(name, wants, move |hostile, queue| {
            hostile.bring(Bring::Call, queue, hostile.call_file(queue));
            bring(hostile, queue);
        })
    };
    vec![
        kick("kick file is a regular file", [Ended; 3], |hostile, queue| {
            hostile.bring(Bring::Kick, queue, memfd().as_fd());
        }),
        kick("kick file is guest memory", [Ended; 3], |hostile, queue| {
            hostile.bring(Bring::Kick, queue, hostile.memory_file());
        }),
        kick("kick file is a pipe with a kick in it", [Ended; 3], |hostile, queue| {
            let (kick, mut end) = std::io::pipe().unwrap();
            end.write_all(&[1; 8]).unwrap();
            hostile.bring(Bring::Kick, queue, kick.as_fd());
        }),
        kick("kick file is a pipe that has ended", [Ended; 3], |hostile, queue| {
            let (kick, end) = std::io::pipe().unwrap();
            drop(end);
            hostile.bring(Bring::Kick, queue, kick.as_fd());
        }),
        kick("kick file is a pipe with half a kick", [Ended; 3], |hostile, queue| {
            let (kick, mut end) = std::io::pipe().unwrap();
            end.write_all(&[1; 3]).unwrap();
            drop(end);
            hostile.bring(Bring::Kick, queue, kick.as_fd());
        }),
        kick("kick file is the writing end of a pipe", [Ended; 3], |hostile, queue| {
            let (end, kick) = std::io::pipe().unwrap();
            hostile.bring(Bring::Kick, queue, kick.as_fd());
            drop(end);
        }),
        kick("kick file is an epoll", GOOD, |hostile, queue| {
            let kick = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            hostile.bring(Bring::Kick, queue, kick.as_fd());
        }),
        kick("kick file is an epoll that is ready", [Ended; 3], |hostile, queue| {
            let kick = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            let data = epoll::EventData::new_u64(0);
            epoll::add(&kick, hostile.call_file(queue), data, epoll::EventFlags::OUT).unwrap();
            hostile.bring(Bring::Kick, queue, kick.as_fd());
        }),
    ]
}

fn call_files() -> Vec<Case> {
    let call = |name: &str, wants, bring: fn(&mut Hostile, usize)| {
        with_file(name, wants, move |hostile, queue| {
            bring(hostile, queue);
            hostile.bring(Bring::Kick, queue, hostile.kick_file(queue));
        })
    };
    vec![
        call("call file is full", GOOD, |hostile, queue| {
            // Interrupts that came before would be too much with it.
            rustix::io::read(hostile.call_file(queue), &mut [0; 8]).ok();
            rustix::io::write(hostile.call_file(queue), &(u64::MAX - 1).to_ne_bytes()).unwrap();
            hostile.bring(Bring::Call, queue, hostile.call_file(queue));
        }),
        call("call file is a pipe that nobody reads", [Ended; 3], |hostile, queue| {
            let (end, call) = std::io::pipe().unwrap();
            drop(end);
            hostile.bring(Bring::Call, queue, call.as_fd());
        }),
        call("call file is the reading end of a pipe", [Ended; 3], |hostile, queue| {
            let (call, _end) = std::io::pipe().unwrap();
            hostile.bring(Bring::Call, queue, call.as_fd());
        }),
        call("call file is a regular file", [Ended; 3], |hostile, queue| {
            hostile.bring(Bring::Call, queue, memfd().as_fd());
        }),
        call("call file is the kick file", GOOD, |hostile, queue| {
            hostile.bring(Bring::Call, queue, hostile.kick_file(queue));
        }),
        call("no call file", GOOD, |_, _| ()),
    ]
}

/// In which order, and how much, a ring is started.
fn starts() -> Vec<Case> {
    let mut cases = vec![with_file("kick file is never sent", [Nothing; 3], |_, _| ())];
    let mut disabled = case("ring is not enabled", [Nothing; 3], offer);
    disabled.set_up = Box::new(|hostile, queue| hostile.frontend.set_vring_enable(queue, false));
    cases.push(disabled);
    let mut early = case("ring enabled before it has a kick file", GOOD, offer);
    early.set_up = Box::new(|hostile, queue| {
        hostile.pause(queue);
        hostile.set_ring(queue, hostile.place(queue))?;
        hostile.frontend.set_vring_enable(queue, true)?;
        hostile.run(queue)
    });
    cases.push(early);
    let mut nowhere = case("kick file without a ring", [Latched; 3], |_, _| ());
    nowhere.untouched = true;
    nowhere.set_up = Box::new(|hostile, queue| hostile.run(queue));
    cases.push(nowhere);
    cases
}

/// What a VMM changes under a running ring.
fn while_running() -> Vec<Case> {
    let changed = |name: &str, wants, act: fn(&mut Hostile, usize)| {
        let mut case = case(name, wants, |_, _| ());
        case.act = Box::new(act);
        case
    };
    vec![
        changed("kick file replaced", [Latched; 3], |hostile, queue| {
            let (end, kick) = std::io::pipe().unwrap();
            hostile.bring(Bring::Kick, queue, end.as_fd());
            drop(kick);
            // It was taken when this is answered.
            hostile.frontend.get_features().unwrap();
        }),
        changed("used ring moved", GOOD, |hostile, queue| {
            let place = hostile.place(queue);
            hostile.move_ring(queue, Place { used: 0x5_0000, ..place }).unwrap();
            offer(hostile, queue);
        }),
        changed("used ring moved onto descriptors", [Latched; 3], |hostile, queue| {
            let place = hostile.place(queue);
            hostile.move_ring(queue, Place { used: place.desc, ..place }).unwrap();
        }),
        changed("index of the device moved on", [Latched; 3], |hostile, queue| {
            let base = hostile.avail(queue) + 3;
            hostile.frontend.set_vring_base(queue, base).unwrap();
        }),
        changed("index of the device moved back", [Latched; 3], |hostile, queue| {
            let base = hostile.avail(queue).wrapping_sub(SIZE + 1);
            hostile.frontend.set_vring_base(queue, base).unwrap();
        }),
        changed("size made odd", [Latched; 3], |hostile, queue| {
            hostile.frontend.set_vring_num(queue, 7).unwrap();
        }),
        changed("size halved", GOOD, |hostile, queue| {
            let place = hostile.place(queue);
            hostile.set_ring(queue, Place { size: SIZE / 2, ..place }).unwrap();
            offer(hostile, queue);
        }),
        changed("memory of its buffers taken away", REFUSED, |hostile, queue| {
            let regions = hostile.regions();
            hostile.frontend.remove_mem_region(&regions[2]).unwrap();
            hostile.describe(hostile.place(queue).desc, &[(HOLE_END, 24, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
            hostile.publish(queue, 0);
        }),
        changed("memory of its used ring taken away", [Latched; 3], |hostile, queue| {
            let (place, regions) = (hostile.place(queue), hostile.regions());
            hostile.move_ring(queue, Place { used: HOLE_END, ..place }).unwrap();
            hostile.frontend.remove_mem_region(&regions[2]).unwrap();
        }),
        changed("memory of its descriptors replaced", [Latched; 3], |hostile, queue| {
            let (place, regions) = (hostile.place(queue), hostile.regions());
            hostile.move_ring(queue, Place { desc: HOLE_END, ..place }).unwrap();
            hostile.frontend.set_mem_table(&regions[..2]).unwrap();
        }),
    ]
}
