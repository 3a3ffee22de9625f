//! Classes of system calls, and what they fail with.
//!
//! Not among them: memory without a file (the allocator's, where an error ends the program by design of its language),
//! and calls that do not fail with right arguments, as writing to an event or making a descriptor non-blocking.

use libc::*;

/// Which calls of a number are meant, by an argument's place and its low 32 bits.
#[derive(Debug)]
pub enum Limit {
    All,
    Only(u32, u32),
    AllBut(u32, u32),
}

/// Calls that fail in the same way.
#[derive(Debug)]
pub struct Class {
    pub name: &'static str,
    pub calls: &'static [c_long],
    /// Not all of them.
    pub limit: Limit,
    pub errno: c_int,
}

const fn class(name: &'static str, calls: &'static [c_long], errno: c_int) -> Class {
    Class { name, calls, limit: Limit::All, errno }
}

/// Every class.
pub const CLASSES: &[Class] = &[
    class("socket", &[SYS_socket, SYS_socketpair], EMFILE),
    class("bind", &[SYS_bind], ENOMEM),
    class("listen", &[SYS_listen], ENOBUFS),
    class("accept4", &[SYS_accept4], EMFILE),
    class("accept4-aborted", &[SYS_accept4], ECONNABORTED),
    class("connect", &[SYS_connect], EAGAIN),
    class("eventfd2", &[SYS_eventfd2], EMFILE),
    class("epoll_create1", &[SYS_epoll_create1], EMFILE),
    class("epoll_ctl", &[SYS_epoll_ctl], ENOSPC),
    class("epoll_wait", &[SYS_epoll_wait, SYS_epoll_pwait], EINTR),
    class("poll", &[SYS_poll, SYS_ppoll], EINTR),
    class("poll-memory", &[SYS_poll, SYS_ppoll], ENOMEM),
    Class { name: "mmap-file", calls: &[SYS_mmap], limit: Limit::AllBut(4, u32::MAX), errno: ENOMEM },
    class("clone", &[SYS_clone], EAGAIN),
    class("openat", &[SYS_open, SYS_openat], EMFILE),
    class("fstat", &[SYS_fstat, SYS_newfstatat, SYS_statx, SYS_stat, SYS_lstat], ENOMEM),
    Class {
        name: "fcntl-dup",
        calls: &[SYS_fcntl],
        limit: Limit::Only(1, F_DUPFD_CLOEXEC as u32),
        errno: EMFILE,
    },
    class("flock", &[SYS_flock], ENOLCK),
    class("fchmod", &[SYS_fchmod], EIO),
    class("ioctl", &[SYS_ioctl], ENOMEM),
    class("getsockopt", &[SYS_getsockopt], ENOBUFS),
    class("sendmsg", &[SYS_sendmsg, SYS_sendto], ENOBUFS),
    class("recvmsg", &[SYS_recvmsg, SYS_recvfrom], ENOMEM),
    class("recvmsg-interrupted", &[SYS_recvmsg, SYS_recvfrom], EINTR),
    class("read", &[SYS_read], EIO),
    class("read-interrupted", &[SYS_read], EINTR),
    Class { name: "write-log", calls: &[SYS_write, SYS_writev], limit: Limit::Only(0, 2), errno: EIO },
    Class {
        name: "write-log-interrupted",
        calls: &[SYS_write, SYS_writev],
        limit: Limit::Only(0, 2),
        errno: EINTR,
    },
    class("unlink", &[SYS_unlink, SYS_unlinkat], EIO),
    class("userfaultfd", &[SYS_userfaultfd], EMFILE),
    class("execve", &[SYS_execve], ENOMEM),
    class("wait", &[SYS_wait4, SYS_waitid], EINTR),
];
