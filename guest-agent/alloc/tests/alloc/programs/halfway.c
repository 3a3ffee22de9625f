/* Protections that the kernel changes in part, and by keys; then there is a child. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

/* A child finds the pages, readable or not, as its parent has them. */
static void fork_with(void *base, size_t pages, size_t hole)
{
	int status;
	pid_t child = fork();
	if (child == 0) {
		for (size_t n = 0; n < pages; n++) {
			if (n == hole)
				continue;
			CHECK(mprotect((char *)base + n * PAGE, PAGE, RW) == 0 && *word(base, n) == 100 + n);
		}
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
	char *base = map_zeros(3), *keyed = map_zeros(3);
	set_words(base, 0, 3, 100);
	set_words(keyed, 0, 3, 100);
	CHECK(munmap(base + PAGE, PAGE) == 0);
	errno = 0;
	CHECK(mprotect(base, 3 * PAGE, PROT_NONE) == -1 && errno == ENOMEM);
	fork_with(base, 3, 1);
	*word(base, 2) = 102;
	CHECK(pkey_mprotect(keyed, 2 * PAGE, PROT_NONE, -1) == 0);
	fork_with(keyed, 3, 3);
	CHECK(pkey_mprotect(keyed, 2 * PAGE, RW, -1) == 0 && words_are(keyed, 0, 3, 100));
	tell_address("base", base);
	tell_address("keyed", keyed);
	await();
	return 0;
}
