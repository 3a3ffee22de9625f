/* A mapping that has grown, in a child for which the agent has no memory. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

#define PAGES 1000

int main(void)
{
	int fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, status;
	char *base = mmap(NULL, 4 * PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(base != MAP_FAILED && munmap(base + PAGES * PAGE, PAGES * PAGE) == 0);
	CHECK(mmap(base, PAGES * PAGE, RW, fixed, -1, 0) == base);
	CHECK(mremap(base, PAGES * PAGE, 2 * PAGES * PAGE, 0) == base);
	set_words(base, 0, 2 * PAGES, 100);
	pid_t child = fork();
	if (child == 0) {
		/* To the program it is one mapping. */
		base = mremap(base, 2 * PAGES * PAGE, 3 * PAGES * PAGE, MREMAP_MAYMOVE);
		CHECK(base != MAP_FAILED && words_are(base, 0, 2 * PAGES, 100) && is_zero(base, 2 * PAGES, 3 * PAGES));
		/* Nor can it be read meanwhile. */
		CHECK(mprotect(base, 3 * PAGES * PAGE, PROT_NONE) == 0);
		base = mremap(base, 3 * PAGES * PAGE, 4 * PAGES * PAGE, MREMAP_MAYMOVE);
		CHECK(base != MAP_FAILED && mprotect(base, 4 * PAGES * PAGE, RW) == 0);
		CHECK(words_are(base, 0, 2 * PAGES, 100) && is_zero(base, 2 * PAGES, 4 * PAGES));
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(words_are(base, 0, 2 * PAGES, 100));
	tell_address("base", base);
	await();
	return 0;
}
