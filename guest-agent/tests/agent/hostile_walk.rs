//! Every hostile message in random order, by several processes at once, while a victim is looked at. `SVM_SEED` repeats a
//! walk (each thread's draws; how the threads meet is up to the scheduler), `SVM_OPS` makes it longer.

use crate::hostile::{
    ALL_KINDS, NUMBERS, PAGE, Scene, Session, VICTIM_VA, alone, bind, create, cut, free, hello, import,
    message, submit,
};
use crate::mock::file;
use guest_agent::message::DEVICES;
use std::os::fd::AsFd;
use virtio_gpu_svm::protocol::GUEST_VA_END;

/// Messages of all threads, unless `SVM_OPS` says otherwise.
const OPS: u64 = 12_000;
const THREADS: u64 = 4;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Mostly something that may work.
    fn number(&mut self) -> u64 {
        if self.below(4) == 0 { self.one_of(&NUMBERS) } else { self.below(8) * PAGE }
    }

    fn va(&mut self) -> u64 {
        match self.below(4) {
            0 => self.number(),
            1 => VICTIM_VA + self.below(8) * PAGE,
            _ => 0x4000_0000 + self.below(64) * PAGE,
        }
    }

    fn message(&mut self) -> Vec<u8> {
        let arena = 1 + self.below(60);
        match self.below(12) {
            0..3 => create(self.va(), self.number()),
            3 | 4 => import(self.va(), self.number(), self.number()),
            5 => free(arena),
            6 | 7 => cut(arena, self.number(), self.number()),
            8 => bind(self.va()),
            9 => submit(self.below(100) as u32, 0, &vec![0xff; self.below(5000) as usize]),
            10 => message(DEVICES, &[]),
            _ => self.garbage(),
        }
    }

    fn garbage(&mut self) -> Vec<u8> {
        let kind = self.one_of(&ALL_KINDS);
        let mut bytes = message(kind, &[0xff; 40]);
        bytes.truncate(self.below(60) as usize);
        bytes
    }
}

/// One process after another, until so many messages were sent.
fn misbehave(scene: &Scene, mut random: Random, ops: u64) {
    let memory = file(8 * PAGE);
    let mut sent = 0;
    while sent < ops {
        let session = match random.below(4) {
            0 => Session::silent(&scene.socket()),
            _ => scene.session(),
        };
        let joined = (random.below(4) == 0).then(|| Session::silent(&scene.socket()));
        if let Some(joined) = &joined {
            joined.status(&hello(session.ctx_id), &[]);
        }
        let reads = random.below(3) != 0;
        for _ in 0..random.below(40) {
            let bytes = random.message();
            let brings = bytes.first() == Some(&6) || random.below(50) == 0;
            let fds = if brings { vec![memory.as_fd()] } else { vec![] };
            sent += 1;
            let gone = match (&joined, reads) {
                // With an answer to each, so that no request is under way when the opener leaves.
                (Some(joined), true) if random.below(2) == 0 => joined.status(&bytes, &fds).is_none(),
                (_, true) => session.status(&bytes, &fds).is_none(),
                (_, false) => session.socket.send(&[&bytes], &fds, false).is_err(),
            };
            if random.below(2) == 0 {
                // As a device names it: a page, in range.
                let va = random.va() % GUEST_VA_END / PAGE * PAGE;
                scene.mock.script(|script| script.fault(session.ctx_id, va));
            }
            if gone {
                break;
            }
        }
    }
}

#[test]
fn hostile_messages_in_random_order() {
    if !alone("hostile_walk::hostile_messages_in_random_order") {
        return;
    }
    let given = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = given("SVM_SEED").unwrap_or_else(guest_agent::driver::new_incarnation);
    let ops = given("SVM_OPS").unwrap_or(OPS);
    println!("SVM_SEED={seed} SVM_OPS={ops}");
    let scene = Scene::new();
    std::thread::scope(|scope| {
        let walks: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (scene, random) = (&scene, Random(seed.wrapping_add(thread << 32)));
                scope.spawn(move || misbehave(scene, random, ops / THREADS))
            })
            .collect();
        while !walks.iter().all(|walk| walk.is_finished()) {
            scene.check_victim(&"a while");
        }
    });
    scene.end();
}
