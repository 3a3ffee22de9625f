//! Calls by number, by the C library's `syscall`: those that are calls of functions that this library stands before are
//! taken for such, and the kernel gets all others as they come. A program that has the instruction in its own code is not
//! seen.

#![expect(unsafe_code, reason = "makes system calls, and takes the place of a function of the C library")]

use libc::c_long;

/// A system call of the library's own, with errno as the C library sets it.
pub const KERNEL: unsafe extern "C" fn(c_long, ...) -> c_long = kernel();

#[cfg(not(target_arch = "x86_64"))]
const fn kernel() -> unsafe extern "C" fn(c_long, ...) -> c_long {
    libc::syscall
}

#[cfg(target_arch = "x86_64")]
use x86_64::kernel;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use crate::heap;
    use crate::maps::{madvise, mmap, mprotect, mremap, munmap, pkey_mprotect, remap_file_pages};
    use crate::pinned::{change_break, shmat, shmdt};
    use libc::{c_int, c_long, c_void, off_t};

    pub(super) const fn kernel() -> unsafe extern "C" fn(c_long, ...) -> c_long {
        // SAFETY: where there are no floats the two are called alike, and it takes as many words as there may be.
        unsafe { std::mem::transmute::<unsafe extern "C" fn(), _>(call_kernel) }
    }

    /// As in the C library. Neither of the two has a frame: a child may come out of the kernel on another stack.
    ///
    /// # Safety
    /// As in the C library.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn syscall() {
        std::arch::naked_asm!(
            ".cfi_startproc",
            "cmp rdi, {mmap}",
            "je {known}",
            "cmp rdi, {mprotect}",
            "je {known}",
            "cmp rdi, {munmap}",
            "je {known}",
            "cmp rdi, {brk}",
            "je {known}",
            "cmp rdi, {mremap}",
            "je {known}",
            "cmp rdi, {madvise}",
            "je {known}",
            "cmp rdi, {shmat}",
            "je {known}",
            "cmp rdi, {shmdt}",
            "je {known}",
            "cmp rdi, {remap_file_pages}",
            "je {known}",
            "cmp rdi, {pkey_mprotect}",
            "je {known}",
            "jmp {call_kernel}",
            ".cfi_endproc",
            mmap = const libc::SYS_mmap,
            mprotect = const libc::SYS_mprotect,
            munmap = const libc::SYS_munmap,
            brk = const libc::SYS_brk,
            mremap = const libc::SYS_mremap,
            madvise = const libc::SYS_madvise,
            shmat = const libc::SYS_shmat,
            shmdt = const libc::SYS_shmdt,
            remap_file_pages = const libc::SYS_remap_file_pages,
            pkey_mprotect = const libc::SYS_pkey_mprotect,
            known = sym known,
            call_kernel = sym call_kernel,
        )
    }

    /// # Safety
    /// As `syscall`.
    #[unsafe(naked)]
    unsafe extern "C" fn call_kernel() {
        std::arch::naked_asm!(
            ".cfi_startproc",
            "mov rax, rdi",
            "mov rdi, rsi",
            "mov rsi, rdx",
            "mov rdx, rcx",
            "mov r10, r8",
            "mov r8, r9",
            "mov r9, [rsp + 8]",
            "syscall",
            // The last 4095 are errors.
            "cmp rax, -4095",
            "jae 2f",
            "ret",
            "2:",
            "neg eax",
            "push rax",
            ".cfi_adjust_cfa_offset 8",
            "call {errno}",
            "pop rcx",
            ".cfi_adjust_cfa_offset -8",
            "mov [rax], ecx",
            "mov rax, -1",
            "ret",
            ".cfi_endproc",
            errno = sym libc::__errno_location,
        )
    }

    /// # Safety
    /// As the function that has this number.
    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "one of them is done")]
    unsafe extern "C" fn known(
        number: c_long,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        e: usize,
        f: off_t,
    ) -> c_long {
        if heap::is_mine() {
            // In the handler of a signal that came while the library was at work: some call by number so that they may.
            // SAFETY: passed on.
            return unsafe { super::KERNEL(number, a, b, c, d, e, f) };
        }
        let at = pointer(a);
        // SAFETY: passed on.
        unsafe {
            match number {
                libc::SYS_mmap => address(mmap(at, b, int(c), int(d), int(e), f)),
                libc::SYS_mprotect => mprotect(at, b, int(c)).into(),
                libc::SYS_munmap => munmap(at, b).into(),
                libc::SYS_brk => change_break(a),
                libc::SYS_mremap => address(mremap(at, b, c, int(d), pointer(e))),
                libc::SYS_madvise => madvise(at, b, int(c)).into(),
                libc::SYS_shmat => address(shmat(int(a), pointer(b), int(c))),
                libc::SYS_shmdt => shmdt(at).into(),
                libc::SYS_remap_file_pages => remap_file_pages(at, b, int(c), d, int(e)).into(),
                libc::SYS_pkey_mprotect => pkey_mprotect(at, b, int(c), int(d)).into(),
                _ => super::KERNEL(number, a, b, c, d, e, f),
            }
        }
    }

    fn pointer(word: usize) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(word)
    }

    fn address(at: *mut c_void) -> c_long {
        c_long::from_ne_bytes(at.expose_provenance().to_ne_bytes())
    }

    /// The kernel takes the lower half of the register, too.
    #[expect(clippy::cast_possible_truncation, reason = "meant")]
    fn int(word: usize) -> c_int {
        word.cast_signed() as c_int
    }
}
