//! Lists in every kind of memory that an ordinary program has, walked by a GPU through plain pointers.
//!
//! Run with `libsvm_alloc.so`. The program itself asks for no arena and binds nothing: it joins the context of its
//! allocator, mirrors its memory on a device once, and launches. A line for each kind, first of this process, then of
//! another one that it starts.

use guest_agent::client::{Client, Vm, packet};
use std::error::Error;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const NODES: usize = 3000;
/// They have to fit on a stack.
const STACK_NODES: usize = 500;

/// As a device's packet CHASE has it.
#[repr(C, align(16))]
struct Node {
    next: AtomicU64,
    value: AtomicU64,
}

impl Node {
    const fn new() -> Self {
        Self { next: AtomicU64::new(0), value: AtomicU64::new(0) }
    }
}

/// Count and sum, stored by the device.
struct Outcome([AtomicU64; 2]);

fn address<T>(of: &T) -> u64 {
    u64::try_from((&raw const *of).addr()).unwrap_or(0)
}

/// Links the nodes in an order that jumps about, and returns the first one's address and the sum of all.
fn link(nodes: &[&Node]) -> (u64, u64) {
    let (mut first, mut sum) = (0, 0u64);
    for (index, node) in (0..).zip(nodes) {
        node.next.store(first, SeqCst);
        node.value.store(index * index + 1, SeqCst);
        sum = sum.wrapping_add(index * index + 1);
        first = address(*node);
    }
    (first, sum)
}

fn walk(vm: &Vm, kind: &str, nodes: &[&Node], outcome: &Outcome) -> Result<()> {
    let (first, sum) = link(nodes);
    let count = u64::try_from(nodes.len())?;
    vm.exec(0, &[packet::chase(address(&outcome.0), first, count + 1, 0)], 0)?.wait()?;
    let told = outcome.0.each_ref().map(|word| word.load(SeqCst));
    if told != [count, sum] {
        return Err(format!("{kind}: the device found {told:?}, not {:?}", [count, sum]).into());
    }
    println!("{kind}: {count} nodes");
    Ok(())
}

static GLOBAL_NODES: [Node; NODES] = [const { Node::new() }; NODES];
static GLOBAL_OUTCOME: Outcome = Outcome([AtomicU64::new(0), AtomicU64::new(0)]);

fn on_a_stack(vm: &Vm) -> Result<()> {
    let nodes = [const { Node::new() }; STACK_NODES];
    let outcome = Outcome([AtomicU64::new(0), AtomicU64::new(0)]);
    walk(vm, "stack of a thread", &nodes.each_ref(), &outcome)
}

fn every_kind() -> Result<()> {
    let client = Client::of_process()?;
    let device = client.devices()?.into_iter().next().ok_or("this guest has no device")?;
    let vm = client.mirror(device.dev_id)?;
    let boxes: Vec<Box<Node>> = (0..NODES).map(|_| Box::new(Node::new())).collect();
    let outcome = Box::new(Outcome([AtomicU64::new(0), AtomicU64::new(0)]));
    walk(&vm, "small blocks", &boxes.iter().map(Box::as_ref).collect::<Vec<_>>(), &outcome)?;
    let large: Vec<Node> = (0..100_000).map(|_| Node::new()).collect();
    walk(&vm, "a large block", &large.iter().step_by(37).collect::<Vec<_>>(), &outcome)?;
    walk(&vm, "globals", &GLOBAL_NODES.iter().collect::<Vec<_>>(), &GLOBAL_OUTCOME)?;
    // A scope hands the error back as a text: errors need not be of any thread.
    let on_thread = || on_a_stack(&vm).map_err(|error| error.to_string());
    std::thread::scope(|scope| scope.spawn(on_thread).join()).map_err(|_| "the thread panicked")??;
    // Out of reach: said by the job, with the address.
    let local = Node::new();
    let refused = vm.exec(0, &[packet::chase(address(&outcome.0), address(&local), 1, 0)], 0)?.wait();
    match refused {
        Err(error) => println!("stack of main: {error}"),
        Ok(()) => return Err("the main stack is in reach, and nothing says so".into()),
    }
    Ok(())
}

fn main() -> ExitCode {
    let told = every_kind().and_then(|()| {
        if std::env::args().len() > 1 {
            return Ok(());
        }
        let status = Command::new(std::env::current_exe()?).arg("again").status()?;
        if status.success() { Ok(()) } else { Err("the second process failed".into()) }
    });
    match told {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("any-pointer: {error}");
            ExitCode::FAILURE
        }
    }
}
