//! The client library: mirrors on devices of all kinds, and jobs that nobody waits for in a call.

use crate::mock::{Shape, eventually};
use crate::world::World;
use guest_agent::client::{Arena, Client, Error, Events, Job, Mirror, packet};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{BIND_CPU_ADDR_MIRROR, BindOp};

const SMALL: Shape = Shape { va_bits: 36, fault_model: 0, address_model: 0, opcodes: 0x1ff };

fn windows(mirror: &Mirror) -> Vec<(u64, u64, u64)> {
    mirror.windows().iter().map(|window| (window.cpu, window.gpu, window.len)).collect()
}

/// What the device was told: CPU address, GPU address, bytes.
fn told(world: &World, dev_id: u32) -> Vec<(u64, u64, u64)> {
    let op = |op: &BindOp| {
        assert_eq!((op.op.get(), op.flags.get(), op.resource_id.get()), (0, BIND_CPU_ADDR_MIRROR, 0));
        (op.addr.get().wrapping_add(op.obj_offset.get()), op.addr.get(), op.range.get())
    };
    let script = world.mock.look();
    let vm = script.vms.values().find(|vm| vm.dev_id == dev_id);
    vm.unwrap().mappings.iter().map(op).collect()
}

/// Adds one to the first word of an arena, by its place on the device.
fn add_one(mirror: &Mirror, arena: &Arena) -> Job {
    let at = mirror.device_address(arena.as_ptr()).unwrap();
    mirror.exec(0, &[packet::atomic_add(at, 1)], 0).unwrap()
}

#[test]
fn wide_device_shows_every_address_as_it_is() {
    let world = World::new(&[Shape::default(), Shape { address_model: 1, ..Shape::default() }]);
    let client = Client::connect(world.socket()).unwrap();
    for dev_id in [0, 1] {
        let mirror = client.mirror(dev_id).unwrap();
        assert_eq!(windows(&mirror), [(0, 0, 1 << 47)]);
        assert_eq!(told(&world, dev_id), windows(&mirror));
        let arena = client.arena(4096, None).unwrap();
        assert_eq!(mirror.device_address(arena.as_ptr()).unwrap(), arena.address());
        assert_eq!((mirror.is_identity(), mirror.link_offset(arena.as_ptr()).unwrap()), (true, 0));
        add_one(&mirror, &arena).wait().unwrap();
        assert_eq!(arena.word(0), 1);
        arena.free().unwrap();
    }
}

/// Arenas from before and after the mirror, far apart and close together.
#[test]
fn small_device_shows_memory_in_windows() {
    let world = World::new(&[SMALL]);
    let client = Client::connect(world.socket()).unwrap();
    let early = client.arena(3 << 20, None).unwrap();
    let far = client.arena(8192, Some(0x5151_0000_0000)).unwrap();
    let mirror = client.mirror(0).unwrap();
    let late = client.arena(4096, None).unwrap();
    assert_eq!((told(&world, 0), mirror.is_identity()), (windows(&mirror), false));
    for arena in [&early, &far, &late] {
        let (cpu, gpu) = (arena.address(), mirror.device_address(arena.as_ptr()).unwrap());
        assert!(gpu < 1 << 36 && gpu != cpu && gpu % 4096 == 0, "{gpu:#x}");
        assert_eq!(mirror.cpu_address(gpu), Some(cpu));
        assert_eq!(cpu.wrapping_add(mirror.link_offset(arena.as_ptr()).unwrap()), gpu);
        add_one(&mirror, arena).wait().unwrap();
        assert_eq!(arena.word(0), 1);
    }
    // A place that is beyond every window is told before the device is asked.
    let outside = mirror.device_address_of(0x1000).unwrap_err();
    assert!(matches!(outside, Error::OutOfReach { address: 0x1000, .. }), "{outside:?}");
    assert!(outside.to_string().contains("make it again"), "{outside}");
}

/// A list whose links are the process' own, on a device that has it elsewhere.
#[test]
fn links_of_a_list_take_one_offset_on_a_small_device() {
    let world = World::new(&[SMALL]);
    let client = Client::connect(world.socket()).unwrap();
    let arena = client.arena(1 << 20, None).unwrap();
    for n in 0..100 {
        let next = if n == 99 { 0 } else { arena.address() + (n + 1) * 4112 };
        arena.set_word((n * 4112) as usize, next);
        arena.set_word((n * 4112 + 8) as usize, n);
    }
    let mirror = client.mirror(0).unwrap();
    let first = mirror.device_address(arena.as_ptr()).unwrap();
    let offset = mirror.link_offset(arena.as_ptr()).unwrap();
    let walk = packet::chase(first + 0x8_0000, first, 1000, offset);
    mirror.exec(0, &[walk], 0).unwrap().wait().unwrap();
    assert_eq!((arena.word(0x8_0000), arena.word(0x8_0008)), (100, 4950));
}

#[test]
fn device_that_cannot_mirror_says_why() {
    let world = World::new(&[
        Shape { fault_model: 2, ..Shape::default() },
        Shape { va_bits: 30, address_model: 1, ..Shape::default() },
        Shape { va_bits: 22, ..Shape::default() },
    ]);
    let client = Client::connect(world.socket()).unwrap();
    let arena = client.arena(8 << 20, None).unwrap();
    let refusal = |dev_id| client.mirror(dev_id).unwrap_err();
    assert!(matches!(refusal(0), Error::NoFaults { .. }), "{:?}", refusal(0));
    assert!(matches!(refusal(1), Error::DoesNotFit { va_bits: 30, .. }), "{:?}", refusal(1));
    assert!(matches!(refusal(2), Error::DoesNotFit { va_bits: 22, .. }), "{:?}", refusal(2));
    assert!(matches!(refusal(3), Error::NoDevice { dev_id: 3 }), "{:?}", refusal(3));
    assert!(refusal(2).to_string().contains("bind_userptr"), "{}", refusal(2));
    // Nothing is left behind.
    assert!(world.mock.look().vms.is_empty());
    arena.free().unwrap();
}

#[test]
fn one_call_mirrors_on_every_device_that_can_or_on_none() {
    let world = World::new(&[Shape::default(), Shape { fault_model: 2, ..Shape::default() }, SMALL]);
    let client = Client::connect(world.socket()).unwrap();
    let mirrors = client.mirror_all().unwrap();
    let devices: Vec<u32> = mirrors.iter().map(|mirror| mirror.device().dev_id).collect();
    assert_eq!(devices, [0, 2]);
    let again = client.mirror_all().unwrap_err();
    assert!(matches!(again, Error::Refused { status: -17, .. }), "{again:?}");
    for mirror in mirrors {
        mirror.end().unwrap();
    }
    // The last one is taken: then the first must not stay.
    let kept = client.mirror(2).unwrap();
    assert!(client.mirror_all().is_err());
    assert_eq!(world.mock.look().vms.len(), 1);
    kept.end().unwrap();
    assert_eq!(client.mirror_all().unwrap().len(), 2);
    let none = World::new(&[Shape { fault_model: 2, ..Shape::default() }]);
    let client = Client::connect(none.socket()).unwrap();
    assert!(matches!(client.mirror_all().unwrap_err(), Error::NothingToMirrorOn));
}

// Jobs that nobody waits for in a call.

#[derive(Default)]
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn readable(events: &Events) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&now)).unwrap() == 1
}

fn nop(mirror: &Mirror) -> Job {
    mirror.exec(0, &[Packet::default()], 0).unwrap()
}

fn paused() -> (World, Client, Mirror) {
    let world = World::new(&[Shape::default()]);
    let client = Client::connect(world.socket()).unwrap();
    let mirror = client.mirror(0).unwrap();
    world.pause(true);
    (world, client, mirror)
}

#[test]
fn job_is_asked_until_it_has_ended_and_told_again() {
    let (world, _client, mirror) = paused();
    let job = nop(&mirror);
    assert!(!job.try_wait().unwrap());
    assert!(!job.wait_timeout(Duration::from_millis(5)).unwrap());
    world.pause(false);
    assert!(job.wait_timeout(Duration::MAX).unwrap());
    assert!(job.try_wait().unwrap() && job.wait_timeout(Duration::ZERO).unwrap());
    job.wait().unwrap();
    let failed = mirror.exec(0, &[packet::fill(4096, 8, 1)], 0).unwrap();
    for _ in 0..2 {
        assert!(matches!(failed.wait_timeout(Duration::MAX), Err(Error::Job(_))));
        assert!(matches!(failed.try_wait(), Err(Error::Job(_))));
    }
}

#[test]
fn future_is_woken_once_its_job_has_ended() {
    let (world, client, mirror) = paused();
    let events = client.events().unwrap();
    let (mut first, mut second) = (nop(&mirror), nop(&mirror));
    let (count, other) = (Arc::new(Count::default()), Arc::new(Count::default()));
    let (waker, other_waker) = (Waker::from(count.clone()), Waker::from(other.clone()));
    let pinned = |job: &mut Job, waker: &Waker| std::pin::Pin::new(job).poll(&mut Context::from_waker(waker));
    assert!(pinned(&mut first, &waker).is_pending());
    assert!(pinned(&mut second, &other_waker).is_pending());
    assert!(!readable(&events) && count.0.load(Ordering::SeqCst) == 0);
    // A dropped future is not woken, and its end makes nobody look.
    drop(second);
    world.pause(false);
    while count.0.load(Ordering::SeqCst) == 0 {
        events.wait(None).unwrap();
    }
    assert!(readable(&events), "its end is not taken yet");
    assert!(matches!(pinned(&mut first, &waker), Poll::Ready(Ok(()))));
    assert_eq!((count.0.load(Ordering::SeqCst), other.0.load(Ordering::SeqCst)), (1, 0));
    eventually("nothing more to look at", || {
        events.dispatch();
        !readable(&events)
    });
}

/// The end arrives while another thread waits for its own reply and reads it on the way.
#[test]
fn end_that_another_call_reads_makes_the_descriptor_readable() {
    let (world, client, mirror) = paused();
    let events = client.events().unwrap();
    let job = nop(&mirror);
    world.pause(false);
    // Answers come in the order of the socket: behind the end sooner or later.
    eventually("an end that was read on the way", || {
        client.devices().unwrap();
        readable(&events)
    });
    // Nobody has to read the socket for it.
    assert!(readable(&events));
    assert!(job.try_wait().unwrap());
    assert!(!readable(&events));
}

/// As tokio's AsyncFd has it: told of changes only.
#[test]
fn edge_triggered_loop_misses_no_end() {
    let world = World::new(&[Shape::default()]);
    let client = Client::connect(world.socket()).unwrap();
    let mirror = client.mirror(0).unwrap();
    let events = client.events().unwrap();
    let edges = epoll::create(CreateFlags::CLOEXEC).unwrap();
    epoll::add(&edges, &events, EventData::new_u64(0), EventFlags::IN | EventFlags::ET).unwrap();
    std::thread::scope(|scope| {
        // Others read all the while.
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..300 {
                    nop(&mirror).wait().unwrap();
                    client.devices().unwrap();
                }
            });
        }
        for round in 0..300 {
            let jobs: Vec<Job> = (0..round % 4 + 1).map(|_| nop(&mirror)).collect();
            // As tokio does: first try, then wait for an edge.
            while !jobs.iter().all(|job| job.try_wait().unwrap()) {
                let mut buffer = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 1];
                let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
                let seen = epoll::wait(&edges, &mut buffer[..], Some(&patience)).unwrap();
                assert!(seen > 0, "round {round}: an end came without an edge");
                events.dispatch();
            }
        }
    });
}

/// Loops of several threads on one descriptor, beside threads that block.
#[test]
fn level_triggered_loops_of_several_threads_miss_no_end() {
    let world = World::new(&[Shape::default()]);
    let client = Client::connect(world.socket()).unwrap();
    let mirror = client.mirror(0).unwrap();
    let events = client.events().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let job = nop(&mirror);
                    while !job.try_wait().unwrap() {
                        events.wait(None).unwrap();
                    }
                }
            });
        }
        for _ in 0..200 {
            nop(&mirror).wait().unwrap();
        }
    });
    eventually("nothing more to look at", || {
        events.dispatch();
        !readable(&events)
    });
}

#[test]
fn agent_that_goes_is_told_to_futures_and_loops() {
    let (world, client, mirror) = paused();
    let events = client.events().unwrap();
    let mut job = nop(&mirror);
    let count = Arc::new(Count::default());
    let waker = Waker::from(count.clone());
    let poll = |job: &mut Job| std::pin::Pin::new(job).poll(&mut Context::from_waker(&waker));
    assert!(poll(&mut job).is_pending());
    drop(world);
    while count.0.load(Ordering::SeqCst) == 0 {
        events.wait(None).unwrap();
    }
    assert!(matches!(poll(&mut job), Poll::Ready(Err(Error::HungUp))));
    assert!(matches!(job.try_wait(), Err(Error::HungUp)));
    assert!(readable(&events));
}

/// Where cargo puts the examples and the libraries of this build.
pub fn built(name: &str) -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let path =
        if name.contains('.') { deps.join(name) } else { deps.parent().unwrap().join("examples").join(name) };
    assert!(path.exists(), "no {}", path.display());
    path
}

#[test]
fn example_walks_its_list_on_every_device_blocking_and_together() {
    let world = World::new(&[Shape::default(), SMALL, Shape { fault_model: 2, ..Shape::default() }]);
    for (nodes, seed) in [("1", "1"), ("3000", "99")] {
        let mut command = Command::new(built("list"));
        command.args([nodes, seed]).env("LD_PRELOAD", built("libsvm_alloc.so"));
        let output = command.env("SVM_AGENT_SOCKET", world.socket()).output().unwrap();
        let (told, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && said.is_empty(), "{}: {told}{said}", output.status);
        let line = format!(" name=mock nodes={nodes} ");
        assert!(told.lines().all(|told| told.contains(&line) && told.ends_with(" ok")), "{told}");
        let starts = ["blocking device=0", "blocking device=1", "together device=0", "together device=1"];
        assert!(told.lines().zip(starts).all(|(line, start)| line.starts_with(start)), "{told}");
        assert_eq!(told.lines().count(), starts.len(), "{told}");
    }
}
