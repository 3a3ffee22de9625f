//! Status values on the wire: Linux errno numbers, negative in a response, 0 for success. PROTOCOL 8.

/// Operation not permitted: a write through a read-only mapping.
pub const EPERM: i32 = 1;
/// No such object in this context.
pub const ENOENT: i32 = 2;
/// Raced with an invalidation; translate again and retry.
pub const EAGAIN: i32 = 11;
/// Out of memory.
pub const ENOMEM: i32 = 12;
/// An object that exists but is not this context's, or not any more.
pub const EACCES: i32 = 13;
/// A guest address without memory behind it.
pub const EFAULT: i32 = 14;
/// In use.
pub const EBUSY: i32 = 16;
/// Already exists, or overlaps.
pub const EEXIST: i32 = 17;
/// Invalid argument.
pub const EINVAL: i32 = 22;
/// A quota or queue is full.
pub const ENOSPC: i32 = 28;
/// A dead GPU VM, or a state that the daemon has lost.
pub const EPIPE: i32 = 32;
/// The device cannot do this.
pub const EOPNOTSUPP: i32 = 95;
/// No room; retry with fewer.
pub const ENOBUFS: i32 = 105;
/// Nobody answered in time, or a job ran too long.
pub const ETIMEDOUT: i32 = 110;
/// Stopped because its context or GPU VM was destroyed, or lost by its device.
pub const ECANCELED: i32 = 125;

/// The name of an errno of this protocol, for people. Takes either sign.
pub fn name(errno: i32) -> &'static str {
    match errno.unsigned_abs().cast_signed() {
        0 => "OK",
        EPERM => "EPERM",
        ENOENT => "ENOENT",
        EAGAIN => "EAGAIN",
        ENOMEM => "ENOMEM",
        EACCES => "EACCES",
        EFAULT => "EFAULT",
        EBUSY => "EBUSY",
        EEXIST => "EEXIST",
        EINVAL => "EINVAL",
        ENOSPC => "ENOSPC",
        EPIPE => "EPIPE",
        EOPNOTSUPP => "EOPNOTSUPP",
        ENOBUFS => "ENOBUFS",
        ETIMEDOUT => "ETIMEDOUT",
        ECANCELED => "ECANCELED",
        _ => "E?",
    }
}
