/* Shared memory of each kind, in this process and in forked children. The argument is a file system's directory. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

static int memory_file(size_t pages)
{
	int fd = memfd_create("test", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, pages * PAGE) == 0);
	return fd;
}

static void *shared(size_t pages, int fd, off_t offset)
{
	void *base = mmap(NULL, pages * PAGE, RW, MAP_SHARED, fd, offset);
	CHECK(base != MAP_FAILED);
	return base;
}

static void reap(pid_t child)
{
	int status;
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
	char *bases[4], *again, name[60];
	int fd = memory_file(9), other;
	uint64_t in_file;

	/* From its second page on, twice; then without its descriptor. */
	bases[0] = shared(8, fd, PAGE);
	again = shared(2, fd, PAGE);
	bases[3] = mmap(NULL, 8 * PAGE, RW, MAP_PRIVATE, fd, PAGE);
	snprintf(name, sizeof name, "/svm-alloc-%d", getpid());
	other = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
	CHECK(other >= 0 && shm_unlink(name) == 0 && ftruncate(other, 8 * PAGE) == 0);
	bases[1] = shared(8, other, 0);
	close(other);
	bases[2] = mmap(NULL, 8 * PAGE - 100, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(bases[2] != MAP_FAILED && is_zero(bases[2], 0, 8));
	for (int n = 0; n < 4; n++) {
		set_words(bases[n], 0, 8, 100 * n);
		tell_address("reached", bases[n]);
	}
	tell_address("again", again);
	await();
	/* The test has added 1000, to the file's first page by its second mapping. */
	for (int n = 0; n < 4; n++)
		CHECK(words_are(bases[n], 0, 8, 100 * n + 1000));
	CHECK(pread(fd, &in_file, 8, PAGE) == 8 && in_file == 1000);

	/* Holes and protection, before there is a child. */
	CHECK(munmap(bases[0] + 2 * PAGE, PAGE) == 0);
	CHECK(mprotect(bases[0] + 4 * PAGE, PAGE, PROT_READ) == 0);
	CHECK(mprotect(bases[0] + 4 * PAGE, PAGE, RW) == 0);
	CHECK(madvise(bases[0] + 5 * PAGE, PAGE, MADV_DONTNEED) == 0 && words_are(bases[0], 5, 6, 1000));
	CHECK(madvise(bases[0] + 6 * PAGE, PAGE, MADV_REMOVE) == 0 && is_zero(bases[0], 6, 7));
	CHECK(madvise(bases[1] + PAGE, PAGE, MADV_DONTFORK) == 0);
	pid_t child = fork();
	if (child == 0) {
		pid_t grandchild = fork();
		if (grandchild == 0) {
			CHECK(words_are(bases[0], 0, 2, 1000) && *word(bases[1], 0) == 1100);
			set_words(bases[2], 0, 8, 5000);
			set_words(bases[3], 0, 8, 6000);
			tell("process", getpid());
			await();
			_exit(0);
		}
		reap(grandchild);
		tell("process", getpid());
		await();
		/* Shared is what was shared, and the rest is its own. */
		CHECK(words_are(bases[2], 0, 8, 5000) && words_are(bases[3], 0, 8, 1300));
		_exit(0);
	}
	reap(child);
	CHECK(words_are(bases[2], 0, 8, 5000) && words_are(bases[3], 0, 8, 1300));
	/* By the other mapping of the same file. */
	CHECK(*word(again, 0) == 77 && *word(bases[0], 0) == 77);
	tell("process", getpid());
	await();

	/* It grows with its file, and moves. */
	CHECK(ftruncate(fd, 20 * PAGE) == 0);
	again = mremap(again, 2 * PAGE, 12 * PAGE, MREMAP_MAYMOVE);
	CHECK(again != MAP_FAILED && *word(again, 0) == 77);
	set_words(again, 0, 12, 7000);
	tell_address("grown", again);
	CHECK(mremap(again + PAGE, 2 * PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, bases[3] + PAGE)
	      == bases[3] + PAGE);
	tell_address("fixed", bases[3]);
	await();
	CHECK(*word(bases[3], 1) == 7777 && *word(bases[3], 0) == 1300);

	/* What the agent cannot have: the program has it all the same. */
	other = open(argv[1], O_TMPFILE | O_RDWR, 0600);
	CHECK(other >= 0 && ftruncate(other, 8 * PAGE) == 0);
	bases[0] = shared(8, other, 0);
	other = memory_file(8);
	bases[1] = shared(12, other, 0);
	bases[2] = mmap(NULL, 8 * PAGE, PROT_READ, MAP_SHARED, other, 0);
	set_words(bases[0], 0, 8, 100);
	set_words(bases[1], 0, 8, 200);
	CHECK(words_are(bases[0], 0, 8, 100) && words_are(bases[2], 0, 8, 200));
	tell_address("disk", bases[0]);
	tell_address("short", bases[1]);
	tell_address("read-only", bases[2]);
	await();
	return 0;
}
