/* Threads map, unmap, move, protect and clear at random, and check every page; main forks meanwhile if asked to. */
#define _GNU_SOURCE
#include "pages.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

#define THREADS 6
#define SLOTS 8
#define MOST 40

/* A range of addresses, and what its pages hold; pages that are not there hold GONE. */
#define GONE UINT64_MAX

struct slot {
	char *base;
	size_t pages;
	uint64_t values[MOST];
	/* Taken out of the reach of GPUs by protecting it. */
	char hidden[MOST];
};

struct thread {
	pthread_t id;
	uint64_t state;
	struct slot slots[SLOTS];
};

static struct thread threads[THREADS];
static uint64_t rounds;
static atomic_int ended;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* A page holds its value in each word, so that a page which is half another one shows. */
static void fill(struct slot *slot, size_t page, uint64_t value)
{
	volatile uint64_t *words = word(slot->base, page);
	slot->values[page] = value;
	for (size_t at = 0; at < WORDS; at++)
		words[at] = value;
}

static void check(struct slot *slot)
{
	for (size_t page = 0; page < slot->pages; page++) {
		volatile uint64_t *words = word(slot->base, page);
		for (size_t at = 0; slot->values[page] != GONE && at < WORDS; at++)
			CHECK(words[at] == slot->values[page]);
	}
}

static void zeros(struct slot *slot, size_t from, size_t to)
{
	for (size_t page = from; page < to; page++)
		slot->values[page] = slot->hidden[page] = 0;
}

static void new_mapping(struct slot *slot, uint64_t *state)
{
	slot->pages = 1 + next(state) % MOST;
	slot->base = map_zeros(slot->pages);
	zeros(slot, 0, slot->pages);
}

/* All that is left of it. */
static void end_mapping(struct slot *slot)
{
	for (size_t page = 0; page < slot->pages; page++)
		if (slot->values[page] != GONE)
			CHECK(munmap(slot->base + page * PAGE, PAGE) == 0);
	slot->pages = 0;
}

static int whole(const struct slot *slot, size_t from, size_t to)
{
	for (size_t page = from; page < to; page++)
		if (slot->values[page] == GONE)
			return 0;
	return 1;
}

/* Whether the library has some memory as the kernel does, because the agent refuses it. */
static int in_parts;

static void resize(struct slot *slot, uint64_t *state)
{
	size_t pages = 1 + next(state) % MOST;
	char *moved = mremap(slot->base, slot->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	/* To the kernel the program's mapping is several by now, perhaps. To the library it is one, when it moves it. */
	if (moved == MAP_FAILED && errno == EFAULT && (in_parts || getenv("TOLD_ASKS")))
		return;
	if (moved == MAP_FAILED)
		perror("mremap");
	CHECK(moved != MAP_FAILED);
	if (pages > slot->pages)
		zeros(slot, slot->pages, pages);
	slot->base = moved;
	slot->pages = pages;
}

static void step(struct slot *slot, uint64_t *state)
{
	size_t from, to;
	char *at;
	if (!slot->pages)
		return new_mapping(slot, state);
	from = next(state) % slot->pages;
	to = from + 1 + next(state) % (slot->pages - from);
	at = slot->base + from * PAGE;
	check(slot);
	switch (next(state) % 12) {
	case 0:
		end_mapping(slot);
		break;
	case 1:
		/* Only what is there: another thread may have the rest. */
		for (size_t page = from; page < to; page++) {
			if (slot->values[page] != GONE)
				CHECK(munmap(slot->base + page * PAGE, PAGE) == 0);
			slot->values[page] = GONE;
		}
		break;
	case 2:
		if (!whole(slot, from, to))
			break;
		CHECK(mmap(at, (to - from) * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
		zeros(slot, from, to);
		check(slot);
		break;
	case 3:
		if (!whole(slot, from, to))
			break;
		CHECK(madvise(at, (to - from) * PAGE, MADV_DONTNEED) == 0);
		for (size_t page = from; page < to; page++)
			slot->values[page] = 0;
		check(slot);
		break;
	case 4:
		if (!whole(slot, from, to))
			break;
		CHECK(mprotect(at, (to - from) * PAGE, PROT_READ) == 0);
		check(slot);
		CHECK(mprotect(at, (to - from) * PAGE, RW) == 0);
		memset(slot->hidden + from, 1, to - from);
		break;
	case 5:
		if (whole(slot, 0, slot->pages)) {
			/* A moved mapping is one of new memory, in a part that was hidden too. */
			for (size_t page = 0; page < slot->pages; page++)
				if (slot->hidden[page])
					return;
			resize(slot, state);
			check(slot);
		}
		break;
	default:
		for (size_t page = from; page < to; page++)
			if (slot->values[page] != GONE)
				fill(slot, page, next(state) >> 1);
	}
}

static void *work(void *argument)
{
	struct thread *thread = argument;
	for (uint64_t round = 0; round < rounds; round++)
		step(&thread->slots[next(&thread->state) % SLOTS], &thread->state);
	ended++;
	return NULL;
}

static void child(uint64_t state, struct slot *quiet)
{
	check(quiet);
	for (int n = 0; n < 30; n++)
		step(quiet, &state);
	_exit(0);
}

int main(int argc, char **argv)
{
	uint64_t seed = strtoull(argv[1], NULL, 10), state = seed, forks = 0;
	static struct slot quiet;
	rounds = strtoull(argv[2], NULL, 10);
	in_parts = argc > 4;
	for (int n = 0; n < THREADS; n++) {
		threads[n].state = seed + n;
		CHECK(pthread_create(&threads[n].id, NULL, work, &threads[n]) == 0);
	}
	/* In the middle of it. */
	usleep(seed % 50000);
	ask();
	for (int more = argc > 3; more; more = ended < THREADS) {
		int status;
		step(&quiet, &state);
		pid_t pid = fork();
		CHECK(pid >= 0);
		if (pid == 0)
			child(next(&state), &quiet);
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
		check(&quiet);
		forks++;
	}
	for (int n = 0; n < THREADS; n++)
		CHECK(pthread_join(threads[n].id, NULL) == 0);
	tell("forks", forks);
	for (int n = 0; n < THREADS * SLOTS; n++) {
		struct slot *slot = &threads[n / SLOTS].slots[n % SLOTS];
		check(slot);
		for (size_t page = 0; page < slot->pages; page++) {
			if (slot->values[page] == GONE)
				continue;
			tell_address(slot->hidden[page] ? "hidden" : "reached", word(slot->base, page));
			tell("value", slot->values[page]);
		}
	}
	tell("end", 0);
	await();
	return 0;
}
