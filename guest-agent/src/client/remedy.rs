//! Why no GPU reaches an address of this process, and what to do, in words: what the allocator library knows of it, or
//! else `/proc/self/maps`.

use super::session;
use std::ops::Range;

/// What to do about a job that touched `address`, which no arena has.
pub fn of(address: u64) -> String {
    // Where it cannot be read, nothing is known.
    about(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default(), address, session::why)
}

/// `why`: what the allocator library says of an address and the mapping that holds it.
fn about(maps: &str, address: u64, why: impl Fn(u64, &Range<u64>) -> Option<String>) -> String {
    let Some(mapping) =
        maps.lines().filter_map(Mapping::read).find(|mapping| mapping.range.contains(&address))
    else {
        return "nothing is mapped there: look whether the address is right, and its memory not freed by now"
            .into();
    };
    if let Some(why) = why(address, &mapping.range) {
        return why;
    }
    match mapping.name {
        "[stack]" => "it is on the main thread's stack, of which no GPU reaches more than 256 KiB, and nothing where \
                      svm-agent does not trust this user: do it on a thread (pthread_create), or use memory of malloc, \
                      or have svm-agent trust this user"
            .into(),
        "[heap]" => "it is memory of brk or sbrk, which no GPU reaches: use malloc, or have svm-agent trust this user".into(),
        "" if !mapping.rights.starts_with("rw") => {
            format!("it is mapped {}: {WANTED}", mapping.rights_in_words())
        }
        "" => format!(
            "it is anonymous memory that is in no arena, such as comes before libsvm_alloc.so is there (start the program \
             by `svm-agent run`), or could not be moved when the program asked for a device (libsvm_alloc.so has said so), or \
             comes by system calls that it does not see: {WANTED}"
        ),
        name if name.starts_with("/anon_hugepage") => {
            "it is memory of MAP_HUGETLB, which is in no arena: use madvise(MADV_HUGEPAGE), or map a memfd made with \
             MFD_HUGETLB, or have svm-agent trust this user"
                .into()
        }
        arena if arena.starts_with("/memfd:svm-arena") => {
            "it is an arena of another context: a forked child opens its own".into()
        }
        name if name.starts_with("/SYSV") => "it is System V shared memory, which no GPU reaches: use shm_open or \
                                              memfd_create and mmap, or malloc, or have svm-agent trust this user"
            .into(),
        file if mapping.shared => format!(
            "it is a shared mapping of {file}, which no GPU reaches unless the file is on tmpfs and mapped to be \
             written: read the file into memory of malloc"
        ),
        library if mapping.rights.starts_with("rw") && is_library(library) => format!(
            "it is a mapping of {library}, and a global of a library that is loaded while there are threads stays out of \
             reach: load it before the first thread or before svm_open, or link it, or use malloc"
        ),
        file => format!(
            "it is a mapping of {file}, which is in no arena: read the file into memory of malloc"
        ),
    }
}

/// Whether a file is a library, by its name: `libm.so`, `libm.so.6`.
fn is_library(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.ends_with(".so") || name.contains(".so.")
}

const WANTED: &str = "map it readable and writable, or use malloc";

/// A line of `/proc/PID/maps`.
struct Mapping<'a> {
    range: Range<u64>,
    rights: &'a str,
    shared: bool,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn read(line: &'a str) -> Option<Self> {
        // Addresses, rights, offset, device, inode; then the name, which may have spaces.
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let rights = fields.next()?;
        let name = fields.nth(3).unwrap_or_default().trim_start();
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Self { range: number(start)?..number(end)?, rights, shared: rights.ends_with('s'), name })
    }

    fn rights_in_words(&self) -> &'static str {
        match self.rights.as_bytes() {
            [b'r', ..] => "read-only",
            [_, b'w', ..] => "write-only",
            _ => "so that nobody may read or write it (PROT_NONE)",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00010000-00020000 r-xp 00000000 08:01 1234                               /usr/bin/some program
00020000-00030000 rw-p 00000000 00:00 0                                  [heap]
00030000-00040000 rw-s 00000000 00:01 5                                  /memfd:svm-arena (deleted)
00040000-00048000 rw-p 00000000 00:00 0 
00048000-0004c000 r--p 00000000 00:00 0 
0004c000-00050000 ---p 00000000 00:00 0 
00050000-00058000 rw-s 00000000 00:01 7                                  /SYSV00000000 (deleted)
00058000-00059000 rw-p 00000000 00:10 8                                  /anon_hugepage (deleted)
00060000-00070000 r--s 00000000 08:01 9                                  /var/data
00070000-00071000 rw-p 00000000 08:01 9                                  /lib/libm.so.6
7ffd0000-7fff0000 rw-p 00000000 00:00 0                                  [stack]
";

    #[test]
    fn each_kind_of_mapping_has_its_remedy() {
        let said = |address, words: &[&str]| {
            let text = about(MAPS, address, |_, _| None);
            assert!(words.iter().all(|word| text.contains(word)), "{address:#x}: {text}");
        };
        said(0x1_8000, &["mapping of /usr/bin/some program", "malloc"]);
        said(0x2_0000, &["sbrk", "malloc"]);
        said(0x3_ffff, &["arena of another context"]);
        said(0x4_0000, &["anonymous", "svm-agent run", "readable and writable", "malloc"]);
        said(0x4_8000, &["mapped read-only", "readable and writable", "malloc"]);
        said(0x4_c000, &["PROT_NONE", "readable and writable", "malloc"]);
        said(0x5_0000, &["System V", "memfd_create"]);
        said(0x5_8000, &["MAP_HUGETLB", "MFD_HUGETLB"]);
        said(0x6_0000, &["shared mapping of /var/data", "tmpfs"]);
        said(0x7_0000, &["mapping of /lib/libm.so.6", "load it before the first thread"]);
        said(0x7ffe_0000, &["main thread's stack", "pthread_create"]);
        for nowhere in [0, 0xffff, 0x7_1000, 0x7fff_0000, u64::MAX] {
            said(nowhere, &["nothing is mapped"]);
        }
    }

    /// Of a mapping that is there.
    #[test]
    fn what_the_allocator_library_knows_comes_first() {
        let why = |address, within: &Range<u64>| Some(format!("{address:#x} in {within:#x?}"));
        assert_eq!(about(MAPS, 0x6_1000, why), format!("{:#x} in {:#x?}", 0x6_1000, 0x6_0000..0x7_0000));
        assert!(about(MAPS, 0x7_1000, why).contains("nothing is mapped"));
    }

    #[test]
    fn this_process_is_read() {
        let local = 0u8;
        let text = of(u64::try_from((&raw const local).addr()).unwrap());
        assert!(!text.contains("nothing"), "{text}");
    }
}
