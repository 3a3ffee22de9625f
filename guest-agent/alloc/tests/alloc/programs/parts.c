/* A mapping falls into more parts than the agent keeps apart. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

#define PAGES 200

static void check_odd(char *base, uint64_t value)
{
	for (size_t n = 1; n < PAGES; n += 2)
		CHECK(*word(base, n) == value + n);
}

int main(void)
{
	char *base = map_zeros(PAGES);
	int status;
	set_words(base, 0, PAGES, 100);
	for (size_t n = 0; n < PAGES; n += 2)
		CHECK(munmap(base + n * PAGE, PAGE) == 0);
	check_odd(base, 100);
	pid_t child = fork();
	if (child == 0) {
		check_odd(base, 100);
		for (size_t n = 1; n < PAGES; n += 2)
			*word(base, n) = 7;
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	check_odd(base, 100);
	/* There is room for something new. */
	CHECK(mmap(base, PAGES * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == base);
	set_words(base, 0, PAGES, 300);
	tell_address("base", base);
	await();
	return 0;
}
