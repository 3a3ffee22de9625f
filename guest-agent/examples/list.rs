//! An ordinary program with a linked list, which every GPU of this guest walks where it is: one after the other, and all at
//! the same time.
//!
//! Run it in a guest where `svm-agent serve` runs: `svm-agent run -- list [NODES [SEED]]`. The nodes are boxes of the
//! standard library; nothing is copied and nothing is registered. It prints a line for each device and way, and ends with 1
//! if one of them found something else than the program itself:
//!
//! ```text
//! blocking device=0 name=soft0 nodes=1000 sum=5242881 expected=5242881 ok
//! ```

use guest_agent::client::{Client, Events, Mirror, packet};
use std::error::Error;
use std::process::ExitCode;
use std::ptr::null;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use virtio_gpu_svm::protocol::job::OP_CHASE;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// As a device's packet CHASE has it.
#[repr(C, align(16))]
struct Node {
    next: *const Node,
    value: u64,
}

/// A list, and what is true of it.
#[expect(clippy::vec_box, reason = "each node is a block of its own, as in a list that grows")]
struct List {
    nodes: Vec<Box<Node>>,
    sum: u64,
}

impl List {
    /// Links follow no order of addresses.
    fn new(count: usize, seed: u64) -> Self {
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut nodes: Vec<_> =
            (0..count).map(|_| Box::new(Node { next: null(), value: random() >> 16 })).collect();
        for index in (1..count).rev() {
            let other = random() % (index as u64 + 1);
            nodes.swap(index, usize::try_from(other).unwrap_or(0));
        }
        let mut first = null();
        for node in &mut nodes {
            node.next = first;
            first = &raw const **node;
        }
        let sum = nodes.iter().fold(0, |sum, node| node.value.wrapping_add(sum));
        Self { nodes, sum }
    }

    fn first(&self) -> *const Node {
        self.nodes.last().map_or(null(), |node| &raw const **node)
    }
}

/// Count and sum, stored by a device.
#[derive(Default)]
struct Found([AtomicU64; 2]);

/// Has a device walk the list: a future, which may also be waited for. Both stay where they are until it has ended.
fn launch(mirror: &Mirror, list: &List, found: &Found) -> Result<guest_agent::client::Job> {
    let (first, limit) = (list.first(), u64::try_from(list.nodes.len())? + 1);
    let (from, to) = (mirror.device_address(first)?, mirror.device_address(found)?);
    Ok(mirror.exec(0, &[packet::chase(to, from, limit, mirror.link_offset(first)?)], 0)?)
}

/// Prints what a device has found. Whether it is right.
fn tell(way: &str, mirror: &Mirror, list: &List, found: &Found) -> bool {
    let [nodes, sum] = found.0.each_ref().map(|word| word.load(SeqCst));
    let right = usize::try_from(nodes) == Ok(list.nodes.len()) && sum == list.sum;
    let (device, verdict) = (mirror.device(), if right { "ok" } else { "wrong" });
    println!(
        "{way} device={} name={} nodes={nodes} sum={sum} expected={} {verdict}",
        device.dev_id, device.name, list.sum
    );
    right
}

/// A task of [`run_all`], to be polled.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// The smallest executor: runs futures side by side on this thread, and waits in poll(2) while none can go on.
fn run_all<T>(events: &Events, mut futures: Vec<impl Future<Output = T> + Unpin>) -> Result<Vec<T>> {
    let woken: Vec<_> = futures.iter().map(|_| Arc::new(Woken(AtomicBool::new(true)))).collect();
    let mut outcomes: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    while outcomes.iter().any(Option::is_none) {
        let tasks = futures.iter_mut().zip(&woken).zip(&mut outcomes);
        for ((future, woken), outcome) in tasks.filter(|(_, outcome)| outcome.is_none()) {
            if woken.0.swap(false, SeqCst) {
                let waker = Waker::from(woken.clone());
                if let Poll::Ready(value) = std::pin::pin!(future).poll(&mut Context::from_waker(&waker)) {
                    *outcome = Some(value);
                }
            }
        }
        let waits = |(woken, outcome): (&Arc<Woken>, &Option<T>)| outcome.is_some() || !woken.0.load(SeqCst);
        if outcomes.iter().any(Option::is_none) && woken.iter().zip(&outcomes).all(waits) {
            events.wait(None)?;
        }
    }
    Ok(outcomes.into_iter().flatten().collect())
}

fn walk_everywhere() -> Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let count = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let seed = arguments.next().map_or(Ok(7), |text| text.parse())?;
    if count == 0 {
        return Err("usage: list [NODES [SEED]]".into());
    }
    let list = List::new(count, seed);
    let client = Client::of_process()?;
    let mut mirrors = client.mirror_all()?;
    mirrors.retain(|mirror| mirror.device().opcodes >> OP_CHASE & 1 != 0);
    let mut right = true;

    for mirror in &mirrors {
        let found = Box::new(Found::default());
        launch(mirror, &list, &found)?.wait()?;
        right &= tell("blocking", mirror, &list, &found);
    }

    let found: Vec<Box<Found>> = mirrors.iter().map(|_| Box::default()).collect();
    let jobs = mirrors.iter().zip(&found).map(|(mirror, found)| launch(mirror, &list, found));
    for end in run_all(&client.events()?, jobs.collect::<Result<Vec<_>>>()?)? {
        end?;
    }
    for (mirror, found) in mirrors.iter().zip(&found) {
        right &= tell("together", mirror, &list, found);
    }
    Ok(right)
}

fn main() -> ExitCode {
    match walk_everywhere() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("list: {error}");
            ExitCode::FAILURE
        }
    }
}
