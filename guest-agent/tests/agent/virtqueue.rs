//! The driver's side of a virtqueue against the device's.

use crate::ring::{Chain, DeviceRing, memory, region};
use guest_agent::driver::Error;
use guest_agent::driver::dma::{PAGE_BYTES, Segment};
use guest_agent::driver::virtqueue::{QueueLayout, Violation, Virtqueue};
use std::collections::HashMap;

/// Both sides of a queue of `size` descriptors.
fn pair(size: u16, event_idx: bool, in_order: bool) -> (Virtqueue, DeviceRing) {
    let (fd, addresses) = memory(4);
    let (driver, device) = (region(&fd, &addresses), region(&fd, &addresses));
    let layout = QueueLayout::at(PAGE_BYTES, size).unwrap();
    let queue = layout.addresses(&driver).unwrap();
    (Virtqueue::new(driver, layout, event_idx, in_order).unwrap(), DeviceRing::new(device, queue, event_idx))
}

/// A segment in the last page, which no ring uses.
fn segment(offset: u64, len: u32) -> Segment {
    Segment { address: 0x1_0000_0000 + offset, len }
}

/// A generator of test cases (xorshift); the seed is printed by whoever uses it.
pub struct Random(u64);

impl Random {
    pub fn seeded() -> Self {
        let seed = std::env::var("SVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(guest_agent::driver::new_incarnation);
        println!("SVM_TEST_SEED={seed}");
        Self(seed | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Long enough for the 16-bit indices to wrap, in random order and batches.
fn any_traffic(event_idx: bool, in_order: bool) {
    let mut random = Random::seeded();
    let (mut driver, mut device) = pair(16, event_idx, in_order);
    let mut driver_has: HashMap<u16, u32> = HashMap::new();
    let mut device_has: Vec<Chain> = Vec::new();
    let mut completed = 0u32;
    while completed < 70_000 {
        for _ in 0..random.below(6) {
            let (read, write) = (random.below(3) as usize, 1 + random.below(3) as usize);
            let readable = vec![segment(0, 8); read];
            let writable = vec![segment(64, 32); write];
            let free = driver.free_descriptors();
            match driver.add(&readable, &writable).unwrap() {
                Some(head) => {
                    let room = 32 * write as u32;
                    assert!(driver_has.insert(head, room).is_none(), "head {head} is in flight twice");
                    assert_eq!(driver.free_descriptors(), free - read - write);
                }
                None => assert!(free < read + write),
            }
        }
        driver.publish().unwrap();
        while let Some(chain) = device.pop() {
            assert_eq!(chain.writable.len() as u32 * 32, driver_has[&chain.head]);
            device_has.push(chain);
        }
        for _ in 0..random.below(8) {
            if device_has.is_empty() {
                break;
            }
            let at = if in_order { 0 } else { random.below(device_has.len() as u64) as usize };
            let chain = device_has.remove(at);
            let len = random.below(u64::from(driver_has[&chain.head]) + 1) as usize;
            device.push(&chain, &vec![7; len]);
        }
        while let Some(used) = driver.take_used().unwrap() {
            let room = driver_has.remove(&used.head).expect("a head that is in flight");
            assert!(used.len <= room);
            completed += 1;
        }
    }
}

#[test]
fn traffic_in_any_order_is_matched() {
    any_traffic(false, false);
    any_traffic(true, false);
    any_traffic(true, true);
}

#[test]
fn one_used_entry_completes_a_batch_in_order() {
    let (mut driver, mut device) = pair(8, false, true);
    let heads: Vec<u16> = (0..3).map(|_| driver.add(&[], &[segment(0, 16)]).unwrap().unwrap()).collect();
    driver.publish().unwrap();
    let chains: Vec<Chain> = std::iter::from_fn(|| device.pop()).collect();
    device.push_raw(u32::from(chains[2].head), 5, 3);
    let used: Vec<(u16, u32)> =
        std::iter::from_fn(|| driver.take_used().unwrap()).map(|used| (used.head, used.len)).collect();
    assert_eq!(used, [(heads[0], 16), (heads[1], 16), (heads[2], 5)]);
    assert_eq!(driver.free_descriptors(), 8);
}

#[test]
fn device_is_notified_only_when_it_asked() {
    let (mut driver, mut device) = pair(8, true, false);
    let add = |driver: &mut Virtqueue| {
        driver.add(&[], &[segment(0, 16)]).unwrap();
        driver.publish().unwrap()
    };
    assert!(add(&mut driver), "the device waits for the first buffer");
    assert!(!add(&mut driver), "the device has not asked again");
    while device.pop().is_some() {}
    assert!(add(&mut driver), "the device has asked again");
}

#[test]
fn driver_is_interrupted_only_when_it_asked() {
    let (mut driver, mut device) = pair(8, true, false);
    for _ in 0..3 {
        driver.add(&[], &[segment(0, 16)]).unwrap();
    }
    driver.publish().unwrap();
    assert!(!driver.arm().unwrap());
    let chains: Vec<Chain> = std::iter::from_fn(|| device.pop()).collect();
    assert!(device.push(&chains[0], &[]), "armed for the first");
    assert!(!device.push(&chains[1], &[]), "not armed since");
    assert!(driver.arm().unwrap(), "there is something already");
    while driver.take_used().unwrap().is_some() {}
    assert!(!driver.arm().unwrap());
    assert!(device.push(&chains[2], &[]), "armed again");
}

#[test]
fn no_notify_flag_is_obeyed_without_event_idx() {
    let (mut driver, device) = pair(8, false, false);
    let add = |driver: &mut Virtqueue| {
        driver.add(&[], &[segment(0, 16)]).unwrap();
        driver.publish().unwrap()
    };
    assert!(add(&mut driver));
    device.set_used_flags(1);
    assert!(!add(&mut driver));
}

/// What a hostile device may write, and what the driver says.
#[test]
fn hostile_used_entries_break_the_queue() {
    // Used id (None: a head that is in flight), length, entries that the index claims.
    type Entry = (Option<u32>, u32, u16);
    let attacks: [(&str, Entry, Violation); 6] = [
        ("id beyond the queue", (Some(8), 0, 1), Violation::UsedId { id: 8 }),
        ("id of 32 bits", (Some(0x1_0000), 0, 1), Violation::UsedId { id: 0x1_0000 }),
        ("id not in flight", (Some(7), 0, 1), Violation::UsedId { id: 7 }),
        ("length beyond the room", (None, 17, 1), Violation::UsedLength { len: 17, room: 16 }),
        (
            "index beyond what is in flight",
            (None, 0, 3),
            Violation::UsedIndex { idx: 3, last: 0, in_flight: 2 },
        ),
        ("index going back", (None, 0, 0xffff), Violation::UsedIndex { idx: 0xffff, last: 0, in_flight: 2 }),
    ];
    for (name, (id, len, claimed), expected) in attacks {
        let (mut driver, mut device) = pair(8, true, false);
        for _ in 0..2 {
            driver.add(&[], &[segment(0, 16)]).unwrap();
        }
        driver.publish().unwrap();
        let chains: Vec<Chain> = std::iter::from_fn(|| device.pop()).collect();
        device.push_raw(id.unwrap_or(chains[0].head.into()), len, claimed);
        match driver.take_used() {
            Err(Error::Protocol(violation)) => assert_eq!(violation, expected, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        assert!(matches!(driver.take_used(), Err(Error::Broken)), "{name}: used after it broke");
        assert!(
            matches!(driver.add(&[], &[segment(0, 16)]), Err(Error::Broken)),
            "{name}: added to after it broke"
        );
    }
}

#[test]
fn same_head_used_twice_breaks_the_queue() {
    let (mut driver, mut device) = pair(8, false, false);
    for _ in 0..2 {
        driver.add(&[], &[segment(0, 16)]).unwrap();
    }
    driver.publish().unwrap();
    let chain = device.pop().unwrap();
    device.push(&chain, &[]);
    device.push(&chain, &[]);
    assert!(driver.take_used().unwrap().is_some());
    assert!(matches!(driver.take_used(), Err(Error::Protocol(Violation::UsedId { .. }))));
}
