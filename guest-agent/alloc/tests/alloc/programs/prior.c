/* What a program does with its memory before it asks for a device; afterwards GPUs find it as it is then. */
#define _GNU_SOURCE
#include "raw.h"
#include "touch.h"
#include <dirent.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

static uint64_t untold[WORDS] __attribute__((aligned(4096)));
/* The second page of each is not for children, or not for dumps. */
static uint64_t wiped[3 * WORDS] __attribute__((aligned(4096)));
static uint64_t absent[3 * WORDS] __attribute__((aligned(4096)));
static uint64_t later[WORDS] __attribute__((aligned(4096)));
static uint64_t dumped[3 * WORDS] __attribute__((aligned(4096)));
static uint64_t data[4 * WORDS] __attribute__((aligned(4096))) = {1};

static int open_descriptors(void)
{
	DIR *folder = opendir("/proc/self/fd");
	int count = 0;
	CHECK(folder);
	while (readdir(folder))
		count++;
	closedir(folder);
	return count;
}

static char *shared(size_t pages, int *out)
{
	int fd = memfd_create("prior", MFD_CLOEXEC);
	char *base;
	CHECK(fd >= 0 && ftruncate(fd, pages * PAGE) == 0);
	base = mmap(NULL, pages * PAGE, RW, MAP_SHARED, fd, 0);
	CHECK(base != MAP_FAILED);
	if (out)
		*out = fd;
	else
		close(fd);
	return base;
}

static char *moved(char *base, size_t from, size_t to)
{
	char *at = mremap(base, from * PAGE, to * PAGE, MREMAP_MAYMOVE);
	CHECK(at != MAP_FAILED);
	return at;
}

/* A userfaultfd of which the kernel's own faults go to a thread, too. */
static int watch(void *base, size_t len)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register area = {.range = {(uintptr_t)base, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0)
		fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	CHECK(fd < 0 || (ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &area) == 0));
	return fd;
}

static void *answer(void *fd)
{
	struct uffd_msg message;
	while (read((uintptr_t)fd, &message, sizeof message) == sizeof message) {
		struct uffdio_zeropage zero = {.range = {message.arg.pagefault.address & -PAGE, PAGE}};
		CHECK(message.event == UFFD_EVENT_PAGEFAULT && ioctl((uintptr_t)fd, UFFDIO_ZEROPAGE, &zero) == 0);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int fd, before, status, watcher;
	char path[256], *cut, *over, *grown, *memory, *parts, *file, *copy, *gone, *only, *guarded, *dirty;
	char *reserved, *scattered, *watched, *hidden, *block;
	pthread_t thread;
	uint64_t words[2];
	pid_t child;
	signal(SIGSEGV, on_fault);
	opendir("/");
	before = open_descriptors();

	/* Nothing is left of it. */
	gone = shared(8, NULL);
	CHECK(munmap(gone + 2 * PAGE, PAGE) == 0 && munmap(gone, 8 * PAGE) == 0);
	gone = moved(shared(4, NULL), 4, 4);
	CHECK(mmap(gone, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == gone);
	CHECK(open_descriptors() == before);

	cut = map_zeros(6);
	set_words(cut, 0, 6, 100);
	CHECK(munmap(cut + 2 * PAGE, PAGE) == 0);
	over = map_zeros(3);
	set_words(over, 0, 3, 1);
	CHECK(mmap(over + PAGE, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == over + PAGE);
	set_words(over, 0, 3, 200);
	grown = map_zeros(4);
	set_words(grown, 0, 4, 300);
	grown = moved(grown, 4, 600);
	set_words(grown, 599, 600, 300);
	grown = moved(grown, 600, 500);
	set_words(grown, 499, 500, 300);

	/* Of a file in memory: grown by the mapping after it grew, and moved in parts. */
	memory = shared(4, &fd);
	set_words(memory, 0, 4, 400);
	CHECK(ftruncate(fd, 8 * PAGE) == 0);
	memory = moved(memory, 4, 8);
	set_words(memory, 4, 8, 400);
	close(fd);
	parts = shared(6, NULL);
	set_words(parts, 0, 6, 500);
	CHECK(munmap(parts + PAGE, PAGE) == 0);
	parts = moved(parts + 3 * PAGE, 3, 3);

	/* Of a file on a disk: a private mapping is the file still, with what was written to it. */
	snprintf(path, sizeof path, "%s/prior.file", argv[1]);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0 && ftruncate(fd, 8 * PAGE) == 0);
	file = mmap(NULL, 8 * PAGE, RW, MAP_SHARED, fd, 0);
	CHECK(file != MAP_FAILED);
	set_words(file, 0, 8, 600);
	CHECK(madvise(file, 8 * PAGE, MADV_DONTDUMP) == 0 && madvise(file, 8 * PAGE, MADV_DONTFORK) == 0);
	copy = mmap(NULL, 4 * PAGE, RW, MAP_PRIVATE, fd, 0);
	dirty = mmap(NULL, 8 * PAGE, RW, MAP_PRIVATE, fd, 0);
	CHECK(copy != MAP_FAILED && dirty != MAP_FAILED);
	*word(copy, 1) = 1;
	CHECK(madvise(copy, 4 * PAGE, MADV_DONTNEED) == 0 && words_are(copy, 0, 4, 600));
	*word(copy, 2) = 7777;
	copy = moved(copy, 4, 8);
	CHECK(words_are(copy, 3, 8, 600) && *word(copy, 2) == 7777);
	*word(dirty, 0) = 8888;

	/* Protected, and some of it not any more. */
	only = map_zeros(3);
	set_words(only, 0, 3, 700);
	CHECK(mprotect(only, 3 * PAGE, PROT_NONE) == 0 && mprotect(only + PAGE, PAGE, RW) == 0);
	CHECK(mprotect(only + 2 * PAGE, PAGE, PROT_READ) == 0);
	set_words(data, 0, 4, 800);
	CHECK(mprotect((char *)data + PAGE, PAGE, PROT_READ) == 0);
	guarded = map_zeros(3);
	set_words(guarded, 0, 3, 900);
	status = madvise(guarded + PAGE, PAGE, MADV_GUARD_INSTALL);
	CHECK(status == 0 || errno == EINVAL);
	/* Changed past the library's eyes. */
	CHECK(raw_call(SYS_munmap, (long)map_zeros(2), PAGE, 0, 0, 0, 0) == 0);
	hidden = map_zeros(2);
	CHECK(raw_call(SYS_mprotect, (long)hidden, PAGE, PROT_READ, 0, 0, 0) == 0);

	/* Watched by a thread, which stands still when the program asks. */
	watched = map_zeros(3);
	set_words(watched, 0, 1, 1100);
	watcher = watch(watched + PAGE, 2 * PAGE);
	CHECK(pthread_create(&thread, NULL, answer, (void *)(intptr_t)watcher) == 0);
	block = aligned_alloc(PAGE, 1 << 20);
	CHECK(pthread_create(&thread, NULL, answer, (void *)(intptr_t)watch(block + PAGE, 2 * PAGE)) == 0);
	CHECK(madvise(untold, PAGE, MADV_DONTDUMP) == 0 && madvise(wiped + WORDS, PAGE, MADV_WIPEONFORK) == 0);
	CHECK(madvise(absent + WORDS, PAGE, MADV_DONTFORK) == 0 && madvise(dumped + WORDS, PAGE, MADV_DONTDUMP) == 0);
	/* To the kernel it is one mapping again. */
	CHECK(madvise(dumped + WORDS, PAGE, MADV_DODUMP) == 0);
	set_words(wiped, 0, 3, 1200);
	set_words(absent, 0, 3, 1300);
	set_words(dumped, 0, 3, 1400);

	/* Reserved, and made writable from the front; and in more pieces than there is account of. */
	reserved = mmap(NULL, 3000 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	scattered = mmap(NULL, 10000 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(reserved != MAP_FAILED && scattered != MAP_FAILED);
	for (int n = 0; n < 2500; n++)
		CHECK(mprotect(reserved + n * PAGE, PAGE, RW) == 0);
	set_words(reserved, 0, 2500, 1000);
	if (argc > 2)
		for (int n = 0; n < 10000; n += 2)
			CHECK(mprotect(scattered + n * PAGE, PAGE, RW) == 0);

	/* A child that never asks, and has less. */
	CHECK(madvise(cut + 5 * PAGE, PAGE, MADV_DONTFORK) == 0 && madvise(over, PAGE, MADV_WIPEONFORK) == 0);
	child = fork();
	if (child == 0) {
		CHECK(words_are(cut, 3, 5, 100) && !can_write(cut, 5) && is_zero(over, 0, 1) && words_are(over, 1, 3, 200));
		set_words(cut, 3, 5, 1);
		set_words(grown, 0, 4, 1);
		*word(data, 0) = 1;
		*word(memory, 7) = 4321;
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	CHECK(words_are(wiped, 0, 3, 1200));
	CHECK(words_are(cut, 3, 5, 100) && words_are(data, 0, 4, 800) && *word(memory, 7) == 4321);

	tell_address("cut", cut);
	tell_address("over", over);
	tell_address("grown", grown);
	tell_address("memory", memory);
	tell_address("parts", parts);
	tell_address("copy", copy);
	tell_address("dirty", dirty);
	tell_address("only", only);
	tell_address("data", data);
	tell_address("guarded", guarded);
	tell_address("reserved", reserved);
	tell_address("hidden", hidden);
	tell_address("untold", untold);
	tell_address("wiped", wiped);
	tell_address("absent", absent);
	tell_address("dumped", dumped);
	tell_address("block", block);
	tell_address("watched", watcher < 0 ? NULL : watched);
	await();
	*word(watched, 1) = *word(block, 1) = 1101;
	CHECK(is_zero(watched, 2, 3));
	CHECK(words_are(wiped, 0, 3, 2200) && words_are(absent, 0, 3, 2300));
	child = fork();
	if (child == 0) {
		CHECK(words_are(wiped, 0, 1, 2200) && is_zero(wiped, 1, 2) && words_are(wiped, 2, 3, 2200));
		CHECK(can_write(absent, 0) && !can_write(absent, 1) && can_write(absent, 2));
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0 && words_are(wiped, 0, 3, 2200));
	CHECK(!can_write(hidden, 0) && can_write(hidden, 1));
	CHECK(!can_write(only, 0) && can_write(only, 1) && !can_write(only, 2) && *word(only, 2) == 702);
	CHECK(!can_write(data, 1) && *word(data, 1) == 801 && *word(data, 2) == 1802);
	CHECK(*word(copy, 2) == 8777 && *word(copy, 7) == 1607 && words_are(file, 0, 8, 600));
	/* What is said of globals that are in reach holds for children of children that ask. */
	CHECK(madvise(later, PAGE, MADV_WIPEONFORK) == 0);
	*word(later, 0) = 1;
	child = fork();
	if (child == 0) {
		CHECK(is_zero(later, 0, 1));
		*word(later, 0) = 1;
		ask();
		child = fork();
		if (child == 0)
			_exit(!is_zero(later, 0, 1));
		CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0 && *word(later, 0) == 1);
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0 && *word(later, 0) == 1);
	/* It is the file as before, and longer. */
	CHECK(ftruncate(fd, 600 * PAGE) == 0);
	file = moved(file, 8, 600);
	*word(file, 0) = 6;
	*word(file, 599) = 7;
	CHECK(pread(fd, words, 8, 0) == 8 && pread(fd, words + 1, 8, 599 * PAGE) == 8);
	CHECK(words[0] == 6 && words[1] == 7);
	return 0;
}
