/* madvise, and what forked children find. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

static int exit_of(pid_t child)
{
	int status;
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static void advise(char *base, size_t page, size_t pages, int advice)
{
	CHECK(madvise(base + page * PAGE, pages * PAGE, advice) == 0);
}

int main(void)
{
	char *base = map_zeros(20);
	int reads;
	CHECK(munmap(base + 3 * PAGE, PAGE) == 0);
	/* Plain memory between. */
	CHECK(mmap(base + 3 * PAGE, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_FIXED, -1, 0)
	      == base + 3 * PAGE);
	set_words(base, 0, 20, 100);
	advise(base, 1, 5, MADV_DONTNEED);
	CHECK(is_zero(base, 1, 6) && *word(base, 0) == 100 && words_are(base, 6, 20, 100));
	advise(base, 7, 1, MADV_FREE);
	set_words(base, 7, 8, 100);
	CHECK(*word(base, 7) == 107);
	errno = 0;
	CHECK(madvise(base + 8 * PAGE, PAGE, MADV_REMOVE) == -1 && errno == EINVAL && *word(base, 8) == 108);
	advise(base, 8, 4, MADV_HUGEPAGE);
	advise(base, 8, 4, MADV_SEQUENTIAL);
	errno = 0;
	CHECK(madvise(base, PAGE, 12345) == -1 && errno == EINVAL);
	tell_address("base", base);
	await();
	*word(base, 3) = 1103;
	CHECK(words_are(base, 0, 20, 1100));

	advise(base, 10, 2, MADV_DONTFORK);
	advise(base, 12, 2, MADV_WIPEONFORK);
	advise(base, 14, 1, MADV_DONTFORK);
	advise(base, 14, 1, MADV_DOFORK);
	/* It cannot be read, and is there all the same. */
	CHECK(mprotect(base + 16 * PAGE, PAGE, PROT_NONE) == 0);
	pid_t child = fork();
	if (child == 0) {
		CHECK(words_are(base, 0, 10, 1100) && is_zero(base, 12, 14) && words_are(base, 14, 16, 1100));
		CHECK(mprotect(base + 16 * PAGE, PAGE, RW) == 0 && *word(base, 16) == 1116);
		set_words(base, 0, 10, 5000);
		set_words(base, 12, 20, 5000);
		tell("child", getpid());
		await();
		child = fork();
		if (child == 0) {
			CHECK(is_zero(base, 12, 14) && words_are(base, 14, 20, 5000));
			*word(base, 10) = 1;
			_exit(0);
		}
		CHECK(exit_of(child) == 1011);
		/* The place is free. */
		CHECK(mmap(base + 10 * PAGE, 2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
		      == base + 10 * PAGE);
		_exit(words_are(base, 12, 20, 5000) ? 0 : 5);
	}
	reads = exit_of(child);
	CHECK(reads == 0);
	CHECK(words_are(base, 0, 16, 1100) && words_are(base, 17, 20, 1100));
	CHECK(mprotect(base + 16 * PAGE, PAGE, RW) == 0 && *word(base, 16) == 1116);
	/* Advice for what is protected. */
	CHECK(mprotect(base + 18 * PAGE, PAGE, PROT_READ) == 0);
	advise(base, 18, 2, MADV_DONTNEED);
	CHECK(is_zero(base, 18, 20));
	tell("end", 0);
	await();
	return 0;
}
