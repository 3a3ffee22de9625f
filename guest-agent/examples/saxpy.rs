//! The shortest useful program: y = a * x + y on a GPU of the host, on plain memory of this process.
//!
//! Run it in a guest where `svm-agent serve` runs: `saxpy [SOCKET]`. It says which GPU did it, and what y holds:
//!
//! ```text
//! soft0: y[0] = 1, y[1] = 3, y[999] = 1999
//! ```

use guest_agent::client::{Client, packet};
use guest_agent::message::DEFAULT_SOCKET;
use std::error::Error;
use std::process::ExitCode;

/// Elements of each vector.
const COUNT: usize = 1000;
/// Bytes of each vector.
const BYTES: usize = COUNT * 8;
/// C: where the GPU sees the memory. Any page-aligned address of the device will do.
const GPU: u64 = 0x4000_0000;

fn main() -> ExitCode {
    match saxpy() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("saxpy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn saxpy() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args().nth(1).unwrap_or_else(|| DEFAULT_SOCKET.into());
    let client = Client::connect(socket)?;
    let device = client.devices()?.into_iter().next().ok_or("this guest has no device")?;

    // A..B: memory of this process. x is the first vector, y the second.
    let mut arena = client.arena(2 * BYTES, None)?;
    let (first, len) = (arena.address(), arena.len() as u64);
    #[expect(unsafe_code, reason = "plain access to shared memory")]
    // SAFETY: no job has been launched yet, so nobody else touches the memory.
    let (x, y) = unsafe { arena.floats_mut(0, 2 * COUNT) }.split_at_mut(COUNT);
    for (index, (x, y)) in x.iter_mut().zip(y).enumerate() {
        *x = index as f64;
        *y = 1.0;
    }

    // C..D: the same memory in the GPU's address space. Nothing is copied; pages follow when the GPU touches them.
    let vm = client.vm(device.dev_id)?;
    vm.bind_userptr(GPU, first, len, 0)?;

    let (gpu_x, gpu_y) = (GPU, GPU + BYTES as u64);
    let job = vm.exec(0, &[packet::axpy(gpu_y, gpu_x, BYTES as u64, 2.0)], 0)?;
    job.wait()?;

    #[expect(unsafe_code, reason = "plain access to shared memory")]
    // SAFETY: the job has ended, so nobody else touches the memory.
    let y = unsafe { arena.floats(BYTES, COUNT) };
    println!("{}: y[0] = {}, y[1] = {}, y[{}] = {}", device.name, y[0], y[1], COUNT - 1, y[COUNT - 1]);
    let wrong = (0..COUNT).filter(|&index| y[index] != 2.0 * index as f64 + 1.0).count();
    if wrong > 0 {
        return Err(format!("{wrong} of {COUNT} elements are wrong").into());
    }
    Ok(())
}
