/* What programs usually do, none of it with a device, as one line of JSON: every time in nanoseconds.
 *
 *   usual run ROUNDS              times of many small blocks of malloc, of mappings, threads and forks
 *   usual start ROUNDS COMMAND... times from the start of a command to its end
 *   usual nothing                 ends at once */
#define _GNU_SOURCE
#include "samples.h"

#include <pthread.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, MAPPED = 64 * PAGE, BLOCKS = 1000, KEPT = 64, MAX_ROUNDS = 1000 };

extern char **environ;

/* What a program of some size has when it forks. */
static char *had[16];

/* BLOCKS pairs of malloc and free, of 16 to 2000 bytes, of which KEPT are there at a time. A time is that of a pair. */
static uint64_t blocks(void)
{
	char *kept[KEPT] = { NULL };
	uint32_t drawn = 1;
	uint64_t begin = now();

	for (size_t i = 0; i < BLOCKS; i++) {
		char **at = &kept[i % KEPT];

		free(*at);
		drawn = drawn * 1664525 + 1013904223;
		*at = malloc(16 + (drawn >> 16) % 1984);
		if (*at == NULL)
			fail("malloc");
		**at = 1;
	}
	for (size_t i = 0; i < KEPT; i++)
		free(kept[i]);
	return (now() - begin) / BLOCKS;
}

/* A mapping, each page of it touched, and its end. */
static uint64_t mapping(void)
{
	uint64_t begin = now();
	char *at = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	for (size_t i = 0; i < MAPPED; i += PAGE)
		((volatile char *)at)[i] = 1;
	if (munmap(at, MAPPED) != 0)
		fail("munmap");
	return now() - begin;
}

static void *idle(void *argument)
{
	return argument;
}

static uint64_t thread(void)
{
	uint64_t begin = now();
	pthread_t thread;

	if (pthread_create(&thread, NULL, idle, NULL) != 0 || pthread_join(thread, NULL) != 0)
		fail("pthread_create");
	return now() - begin;
}

static void end_well(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child || status != 0) {
		fprintf(stderr, "usual: a child ended with status %#x\n", status);
		exit(1);
	}
}

static uint64_t forked(void)
{
	uint64_t begin = now();
	pid_t child = fork();

	if (child < 0)
		fail("fork");
	if (child == 0)
		_exit(0);
	end_well(child);
	return now() - begin;
}

static int run(size_t rounds)
{
	static uint64_t times[4][MAX_ROUNDS];
	uint64_t (*const measured[4])(void) = { blocks, mapping, thread, forked };
	const char *const names[4] = { "malloc", "mmap", "thread", "fork" };

	for (size_t i = 0; i < sizeof(had) / sizeof(had[0]); i++) {
		had[i] = malloc(MAPPED);
		if (had[i] == NULL)
			fail("malloc");
		memset(had[i], 1, MAPPED);
	}
	/* The first of each is another matter: not counted. */
	for (size_t kind = 0; kind < 4; kind++)
		measured[kind]();
	for (size_t i = 0; i < rounds; i++)
		for (size_t kind = 0; kind < 4; kind++)
			times[kind][i] = measured[kind]();
	printf("{");
	for (size_t kind = 0; kind < 4; kind++)
		tell(names[kind], times[kind], rounds, kind < 3 ? ", " : "}\n");
	return 0;
}

static int start(size_t rounds, char **command)
{
	static uint64_t times[MAX_ROUNDS];

	for (size_t i = 0; i < rounds; i++) {
		uint64_t begin = now();
		pid_t child;

		if (posix_spawnp(&child, command[0], NULL, NULL, command, environ) != 0)
			fail(command[0]);
		end_well(child);
		times[i] = now() - begin;
	}
	printf("{");
	tell("start", times, rounds, "}\n");
	return 0;
}

int main(int argc, char **argv)
{
	size_t rounds = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	int counted = rounds > 0 && rounds <= MAX_ROUNDS;

	if (argc == 2 && strcmp(argv[1], "nothing") == 0)
		return 0;
	if (argc == 3 && counted && strcmp(argv[1], "run") == 0)
		return run(rounds);
	if (argc > 3 && counted && strcmp(argv[1], "start") == 0)
		return start(rounds, argv + 3);
	fprintf(stderr, "usage: usual run ROUNDS | usual start ROUNDS COMMAND... | usual nothing\n");
	return 2;
}
