/* Closes all descriptors but the standard ones, as daemons do, and opens others in their place. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

int main(void)
{
	int pair[2], status;
	char byte, *zeros = map_zeros(8);
	char *shared = mmap(NULL, 8 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(shared != MAP_FAILED);
	set_words(zeros, 0, 8, 100);
	set_words(shared, 0, 8, 200);
	for (int fd = 3; fd < 2000; fd++)
		close(fd);
	CHECK(pipe(pair) == 0);
	for (int fd = 5; fd < 1000; fd++)
		CHECK(dup2(pair[1], fd) == fd);
	for (int n = 0; n < 10; n++) {
		uint64_t *block = malloc(3 << 20);
		CHECK(block);
		block[999] = n;
		free(block);
		CHECK(malloc(200000));
	}
	CHECK(munmap(zeros + PAGE, PAGE) == 0 && munmap(shared + PAGE, PAGE) == 0);
	zeros = mremap(zeros + 2 * PAGE, 6 * PAGE, 9 * PAGE, MREMAP_MAYMOVE);
	shared = mremap(shared + 2 * PAGE, 6 * PAGE, 5 * PAGE, MREMAP_MAYMOVE);
	CHECK(zeros != MAP_FAILED && shared != MAP_FAILED);
	CHECK(words_are(zeros, 0, 6, 102) && is_zero(zeros, 6, 9) && words_are(shared, 0, 5, 202));
	if (fork() == 0) {
		CHECK(words_are(zeros, 0, 6, 102) && words_are(shared, 0, 5, 202));
		set_words(zeros, 0, 9, 300);
		set_words(shared, 0, 5, 300);
		_exit(0);
	}
	CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(words_are(zeros, 0, 6, 102) && words_are(shared, 0, 5, 300));
	/* Nothing was sent there. */
	for (int fd = 5; fd < 1000; fd++)
		close(fd);
	close(pair[1]);
	CHECK(read(pair[0], &byte, 1) == 0);
	tell("closed", 1);
	await();
	return 0;
}
