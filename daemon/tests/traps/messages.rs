//! Every request in every form, in an order that is drawn, and every message cut at every byte. `SVM_SEED` draws another
//! order, `SVM_OPS` says how many rounds.

use crate::raw::*;
use crate::vmm::Vmm;
use crate::{Footprint, Scene};
use daemon::session::FEATURES;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use virtio_gpu_svm::protocol::gpu::{CtrlHdr, VIRTIO_GPU_CMD_GET_DISPLAY_INFO};
use zerocopy::IntoBytes;

/// Requests, known or not.
const REQUESTS: u32 = 61;
/// Messages after which the neighbour is asked.
const ASK_EVERY: usize = 16;

/// What belongs behind a request's header, in a session as [`Raw`] makes it, and how many descriptors.
fn right(request: u32) -> (Vec<u8>, usize) {
    let pair = |a: u32, b: u32| [a, b].map(u32::to_le_bytes).concat();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let region = [0, MEMORY, BASE, 0];
    match request {
        SET_FEATURES => (words(&[FEATURES]), 0),
        SET_MEM_TABLE => (table(&[region]), 1),
        SET_LOG_BASE => (words(&[0x1000, 0]), 1),
        7 | 33 => (vec![], 1),
        SET_VRING_NUM => (pair(0, 16), 0),
        SET_VRING_ADDR => (ring_areas(0), 0),
        SET_VRING_BASE | GET_VRING_BASE | 23 | 35 => (pair(0, 0), 0),
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => (words(&[0]), 1),
        SET_PROTOCOL_FEATURES => (words(&[ALL_PROTOCOL]), 0),
        SET_VRING_ENABLE => (pair(0, 1), 0),
        19 | 20 | 27 | 39 => (words(&[1]), 0),
        21 => (vec![], 1),
        22 => (words(&[0; 5]), 0),
        GET_CONFIG | SET_CONFIG => ([pair(0, 4), pair(0, 0)].concat(), 0),
        26 => (vec![0; 64], 0),
        31 => (words(&[0x1000, 0, 0x10_0003]), 0),
        32 => (words(&[0x1000, 0, 0x10_0003]), 1),
        ADD_MEM_REG => (one_region([1 << 30, MEMORY, BASE + (1 << 30), 0]), 1),
        38 => (one_region(region), 0),
        41 => (vec![1; 16], 0),
        42 => (pair(0, 0), 1),
        _ => (vec![], 0),
    }
}

/// The forms of a body.
const BODIES: [fn(Vec<u8>) -> Vec<u8>; 5] = [
    |_| vec![],
    |right| right[..right.len().saturating_sub(1)].to_vec(),
    |right| right,
    |right| [right, vec![0; 8]].concat(),
    |right| [right, vec![0xff; 3000]].concat(),
];
/// Descriptors that come along; `None`: the right number.
const DESCRIPTORS: [Option<usize>; 5] = [None, Some(0), Some(1), Some(9), Some(33)];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A session in one of the states in which a message may find it.
fn session(scene: &Scene, state: usize) -> Raw {
    let socket = scene.socket("vm0");
    if state == 0 {
        return Raw::connect(&socket);
    }
    let raw = Raw::negotiated(&socket, ALL_PROTOCOL);
    if state > 1 {
        raw.send_memory();
        (0..3).for_each(|queue| raw.start_ring(queue));
    }
    raw
}

fn answers(vmm: &mut Vmm) {
    let hdr = CtrlHdr { kind: VIRTIO_GPU_CMD_GET_DISPLAY_INFO.into(), ..CtrlHdr::default() };
    assert_eq!(vmm.command(hdr.as_bytes()).len(), 408);
}

#[test]
fn every_request_in_every_form_costs_its_own_session_at_most() {
    let (seed, rounds) = (number("SVM_SEED", 1), number("SVM_OPS", 1));
    println!("SVM_SEED={seed} SVM_OPS={rounds}");
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let scene = Scene::start();
    let mut neighbour = Vmm::start(&scene.socket("vm1"));
    let before = Footprint::settled();
    let (mut sent, mut ended) = (0, 0);
    for _ in 0..rounds {
        let mut forms: Vec<_> = (0..REQUESTS)
            .flat_map(|request| (0..BODIES.len() * DESCRIPTORS.len()).map(move |form| (request, form)))
            .collect();
        (1..forms.len()).rev().for_each(|last| forms.swap(last, random.below(last + 1)));
        let mut raw = session(&scene, random.below(3));
        for (request, form) in forms {
            let (body, fds) = right(request);
            let body = BODIES[form % BODIES.len()](body);
            let count = DESCRIPTORS[form / BODIES.len()].unwrap_or(fds);
            let (socket, _peer) = UnixStream::pair().unwrap();
            let file = match request {
                SET_VRING_KICK..=SET_VRING_ERR | 42 => raw.event.as_fd(),
                21 | 33 => socket.as_fd(),
                _ => raw.memory.as_fd(),
            };
            // Whether a reply is wanted.
            let flags = PLAIN | (random.next() as u32 & 8);
            raw.send_bytes(&message(request, flags, &body), &vec![file; count]);
            sent += 1;
            if sent % ASK_EVERY == 0 {
                answers(&mut neighbour);
            }
            if !raw.lives() {
                ended += 1;
                drop(raw);
                scene.wait_disconnected("vm0");
                raw = session(&scene, random.below(3));
            }
        }
    }
    scene.registry.remove("vm0");
    answers(&mut neighbour);
    println!("{sent} messages, {ended} sessions ended by them");
    // Of the 16 requests that any session takes in their right form, none is refused; most others are.
    assert!(ended > sent / 2 && ended < sent, "{ended} of {sent}");
    // Of the guest that was removed: its listening socket, twice, and the event that stops its thread; and that thread.
    let after =
        Footprint { descriptors: before.descriptors - 3, threads: before.threads_without("guest vm0") };
    after.wait_restored();
}

#[test]
fn every_message_cut_at_every_byte_ends_its_session() {
    let scene = Scene::start();
    let mut neighbour = Vmm::start(&scene.socket("vm1"));
    let before = Footprint::settled();
    let requests = [
        GET_FEATURES,
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_ADDR,
        GET_VRING_BASE,
        SET_VRING_KICK,
        GET_CONFIG,
        RESET_DEVICE,
        ADD_MEM_REG,
        42,
    ];
    for request in requests {
        let (body, fds) = right(request);
        let whole = message(request, PLAIN, &body);
        for cut in 1..whole.len() {
            let raw = session(&scene, 1);
            let fds: Vec<BorrowedFd<'_>> = vec![raw.memory.as_fd(); fds];
            raw.send_bytes(&whole[..cut], &fds);
            drop(fds);
            drop(raw);
            let reason = scene.wait_disconnected("vm0");
            assert!(!reason.contains("internal fault"), "{request} cut at {cut}: {reason}");
        }
        answers(&mut neighbour);
    }
    before.wait_restored();
}
