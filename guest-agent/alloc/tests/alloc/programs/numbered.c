/* Calls by number: what is mapped so is reached, and what is done to it so is seen. */
#define _GNU_SOURCE
#include "touch.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>

static char *map(size_t pages, int flags, int fd, off_t offset)
{
	char *base = (char *)syscall(SYS_mmap, NULL, pages * PAGE, RW, flags, fd, offset);
	CHECK(base != MAP_FAILED);
	return base;
}

static char *map_zeros_so(size_t pages)
{
	return map(pages, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static int memory_file(size_t pages)
{
	int fd = memfd_create("numbered", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, pages * PAGE) == 0);
	return fd;
}

static int fails(long result, int why)
{
	return result == -1 && errno == why;
}

/* What the kernel gets as it comes, six arguments of it, too. */
static void others(void)
{
	int from = memory_file(1), to = memory_file(1);
	loff_t at = 0;
	char *break_now = (char *)syscall(SYS_brk, 0);
	int id = shmget(IPC_PRIVATE, PAGE, 0600);
	char *segment = (char *)syscall(SYS_shmat, id, NULL, 0);

	CHECK(syscall(SYS_getpid) == getpid());
	CHECK(fails(syscall(SYS_close, -1), EBADF) && fails(syscall(SYS_munmap, 1, PAGE), EINVAL));
	CHECK(fails(syscall(SYS_mmap, NULL, 0, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), EINVAL));
	CHECK(fails(syscall(SYS_copy_file_range, from, NULL, to, &at, PAGE, 1), EINVAL));
	CHECK(pwrite(from, "yes", 4, 0) == 4 && syscall(SYS_copy_file_range, from, NULL, to, &at, PAGE, 0) == PAGE);
	CHECK(at == PAGE && *map(1, MAP_SHARED, to, 0) == 'y');

	CHECK((char *)syscall(SYS_brk, break_now + PAGE) == break_now + PAGE);
	*break_now = 1;
	CHECK((char *)syscall(SYS_brk, break_now) == break_now);
	CHECK(segment != MAP_FAILED && shmctl(id, IPC_RMID, NULL) == 0);
	*segment = 1;
	CHECK(syscall(SYS_shmdt, segment) == 0 && fails(syscall(SYS_shmdt, segment), EINVAL));
}

int main(void)
{
	int fd = memory_file(12), early_fd = memory_file(8);
	char *early = map(4, MAP_SHARED, early_fd, 0), *place, *grown;
	char *base = map_zeros_so(8), *moved = map_zeros_so(4), *file = map(8, MAP_SHARED, fd, 2 * PAGE), *was = moved;
	signal(SIGSEGV, on_fault);
	others();
	set_words(early, 0, 4, 400);
	CHECK(remap_file_pages(early + 3 * PAGE, PAGE, 0, 1, 0) == 0 && *word(early, 3) == 401);
	set_words(base, 0, 8, 100);
	set_words(moved, 0, 4, 200);
	set_words(file, 0, 8, 300);
	tell_address("base", base);
	tell_address("moved", moved);
	tell_address("file", file);
	tell_address("early", early);
	await();
	CHECK(words_are(base, 0, 8, 1100) && words_are(moved, 0, 4, 1200) && words_are(file, 0, 8, 1300));

	CHECK(syscall(SYS_munmap, base + PAGE, PAGE) == 0 && !can_write(base, 1));
	CHECK(syscall(SYS_mprotect, base + 2 * PAGE, PAGE, PROT_READ) == 0 && !can_write(base, 2));
	CHECK(syscall(SYS_pkey_mprotect, base + 3 * PAGE, PAGE, PROT_NONE, -1) == 0 && !can_write(base, 3));
	CHECK(syscall(SYS_madvise, base + 4 * PAGE, PAGE, MADV_DONTNEED) == 0 && is_zero(base, 4, 5));
	moved = (char *)syscall(SYS_mremap, moved, 4 * PAGE, 200 * PAGE, MREMAP_MAYMOVE, NULL);
	CHECK(moved != MAP_FAILED && words_are(moved, 0, 4, 1200));
	/* Its pages 5 and 2 are in the file where it has 0 and 7. */
	CHECK(syscall(SYS_remap_file_pages, file + 5 * PAGE, PAGE, 0, 2, 0) == 0);
	CHECK(remap_file_pages(file + 2 * PAGE, PAGE, 0, 9, 0) == 0);
	CHECK(*word(file, 5) == 1300 && *word(file, 2) == 1307 && *word(file, 3) == 1303);
	CHECK(fails(syscall(SYS_remap_file_pages, base + 5 * PAGE, PAGE, 0, 0, 0), EINVAL));
	tell_address("moved", moved);
	tell("stayed", was == moved);
	await();
	/* Shorter, it is as it was; to another place the kernel moves one mapping at a time, or all three. */
	CHECK(syscall(SYS_mremap, file, 8 * PAGE, 5 * PAGE, 0, NULL) == (long)file);
	CHECK(*word(file, 0) == 1300 && *word(file, 2) == 1307 && *word(file, 4) == 1304 && !can_write(file, 5));
	/* A page by itself is memory like any other, with what is behind it in the file. */
	CHECK(ftruncate(fd, 14 * PAGE) == 0);
	place = map_zeros(3);
	grown = (char *)syscall(SYS_mremap, file + 2 * PAGE, PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	CHECK(grown == place && *word(grown, 0) == 1307 && is_zero(grown, 1, 3));
	/* The kernel moves one mapping at a time, or not. */
	place = map_zeros(4);
	syscall(SYS_mremap, early, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	tell_address("grown", grown);
	tell_address("place", place);
	await();
	CHECK(*word(base, 0) == 2100 && *word(base, 4) == 1000 && words_are(base, 5, 8, 2100));
	CHECK(words_are(moved, 0, 4, 2200));
	return 0;
}
