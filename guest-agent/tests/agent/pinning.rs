//! Whether this machine lets a process pin memory. Asked by doing it: a sysctl, a limit of locked memory and a filter of
//! system calls may each forbid it.

#![expect(unsafe_code, reason = "registers memory with io_uring, as a process would")]

use io_uring::IoUring;
use std::io;

/// More than tests that run beside each other pin: the limit is one for all processes of a user.
const BYTES: usize = 32 << 20;

/// What the kernel says, where it does not.
pub fn refusal() -> Option<io::Error> {
    let memory = vec![1u8; BYTES];
    let buffer = libc::iovec { iov_base: memory.as_ptr().cast_mut().cast(), iov_len: BYTES };
    let register = |ring: IoUring| {
        // SAFETY: the memory outlives the ring, and no operation is ever submitted on it.
        unsafe { ring.submitter().register_buffers(&[buffer]) }
    };
    IoUring::new(1).and_then(register).err()
}
