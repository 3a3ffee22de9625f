/* Processes that ask for a device, one after the other, while threads of theirs fork, map and allocate. */
#define _GNU_SOURCE
#include "pages.h"
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

enum { PROCESSES = 60, SECONDS = 20 };

static atomic_int asked;

static int ignore(struct dl_phdr_info *info, size_t size, void *unused)
{
	return 0;
}

/* The child of a thread finds the loader's lock free, whoever has it in its parent, and its memory as it was. */
static void *forks(void *unused)
{
	volatile uint64_t local = 5, *block = malloc(100000);
	block[1000] = 6;
	while (!asked) {
		int status;
		pid_t child = fork();
		if (child == 0) {
			alarm(SECONDS);
			dl_iterate_phdr(ignore, NULL);
			_exit(local == 5 && block[1000] == 6 ? 0 : 1);
		}
		CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	}
	return NULL;
}

static void *maps(void *unused)
{
	while (!asked) {
		char *mapping = map_zeros(8), *block = malloc(3000);
		set_words(mapping, 0, 8, 1);
		CHECK(munmap(mapping + PAGE, PAGE) == 0);
		block[2999] = 1;
		CHECK(words_are(mapping, 2, 8, 1) && munmap(mapping, 8 * PAGE) == 0);
		free(block);
	}
	return NULL;
}

static void ask_in_a_crowd(int number)
{
	pthread_t threads[4];
	pthread_attr_t attr;
	uint64_t *block = malloc(5000);
	block[600] = number;
	alarm(SECONDS);
	/* One forks on a stack that is moved as a whole. */
	CHECK(pthread_attr_init(&attr) == 0);
	CHECK(pthread_attr_setstack(&attr, aligned_alloc(PAGE, 256 << 10), 256 << 10) == 0);
	for (int n = 0; n < 4; n++)
		CHECK(pthread_create(&threads[n], n == 0 ? &attr : NULL, n < 2 ? forks : maps, NULL) == 0);
	usleep(2000 + number * 577 % 5000);
	ask();
	asked = 1;
	for (int n = 0; n < 4; n++)
		CHECK(pthread_join(threads[n], NULL) == 0);
	CHECK(block[600] == number);
	_exit(0);
}

int main(void)
{
	for (int number = 0; number < PROCESSES; number++) {
		int status;
		pid_t child = fork();
		if (child == 0)
			ask_in_a_crowd(number);
		CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	}
	tell("end", 0);
	await();
	return 0;
}
