/* Threads allocate, resize, hand over and free at random, and check what they find; main forks meanwhile if asked to. */
#define _GNU_SOURCE
#include "told.h"
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

#define THREADS 8
#define SLOTS 300

struct block {
	uint64_t seed;
	size_t len;
	unsigned char bytes[];
};

/* Shared: whoever takes a block owns it. */
static _Atomic(struct block *) slots[SLOTS];
static uint64_t rounds;
static atomic_int ended;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static unsigned char byte_at(uint64_t seed, size_t at)
{
	return (seed * 31 + at * 7) >> 3;
}

static void fill(struct block *block, size_t from)
{
	for (size_t at = from; at < block->len; at++)
		block->bytes[at] = byte_at(block->seed, at);
}

static void check(const struct block *block, size_t len)
{
	for (size_t at = 0; at < len; at++)
		CHECK(block->bytes[at] == byte_at(block->seed, at));
}

static size_t some_len(uint64_t *state)
{
	uint64_t kind = next(state) % 1000;
	if (kind == 0)
		return (1 << 20) + next(state) % (1 << 20);
	return kind < 30 ? next(state) % 60000 : next(state) % 600;
}

static struct block *made(uint64_t *state)
{
	size_t len = some_len(state);
	size_t align = (size_t)16 << next(state) % 9;
	struct block *block;
	switch (next(state) % 4) {
	case 0:
		block = aligned_alloc(align, sizeof *block + len);
		CHECK((uintptr_t)block % align == 0);
		break;
	case 1:
		block = calloc(1, sizeof *block + len);
		for (size_t at = 0; at < len; at++)
			CHECK(block->bytes[at] == 0);
		break;
	default:
		block = malloc(sizeof *block + len);
	}
	CHECK(block);
	block->seed = next(state);
	block->len = len;
	fill(block, 0);
	return block;
}

static void *work(void *argument)
{
	uint64_t state = (uintptr_t)argument;
	for (uint64_t round = 0; round < rounds; round++) {
		struct block *block = atomic_exchange(&slots[next(&state) % SLOTS], NULL);
		if (!block) {
			block = made(&state);
		} else if (next(&state) % 3 == 0) {
			size_t len = some_len(&state), kept = len < block->len ? len : block->len;
			check(block, block->len);
			block = realloc(block, sizeof *block + len);
			CHECK(block);
			check(block, kept);
			block->len = len;
			fill(block, kept);
		} else {
			check(block, block->len);
			free(block);
			continue;
		}
		block = atomic_exchange(&slots[next(&state) % SLOTS], block);
		if (block) {
			check(block, block->len);
			free(block);
		}
	}
	ended++;
	return NULL;
}

/* What the child finds is as it was at the fork: blocks that nobody was working on are whole. */
static void child(uint64_t seed, struct block *quiet)
{
	uint64_t state = seed;
	check(quiet, quiet->len);
	for (int n = 0; n < 200; n++) {
		struct block *block = made(&state);
		check(block, block->len);
		free(block);
	}
	free(quiet);
	_exit(0);
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	uint64_t seed = strtoull(argv[1], NULL, 10), state = seed;
	rounds = strtoull(argv[2], NULL, 10);
	for (uint64_t n = 0; n < THREADS; n++)
		CHECK(pthread_create(&threads[n], NULL, work, (void *)(seed + n)) == 0);
	/* In the middle of it. */
	usleep(seed % 50000);
	ask();
	uint64_t forks = 0;
	for (int more = argc > 3; more; more = ended < THREADS) {
		struct block *quiet = made(&state);
		pid_t pid = fork();
		int status;
		CHECK(pid >= 0);
		if (pid == 0)
			child(next(&state), quiet);
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
		check(quiet, quiet->len);
		free(quiet);
		forks++;
	}
	for (int n = 0; n < THREADS; n++)
		CHECK(pthread_join(threads[n], NULL) == 0);
	for (int n = 0; n < SLOTS; n++)
		if (slots[n])
			check(slots[n], slots[n]->len);
	tell("forks", forks);
	return 0;
}
