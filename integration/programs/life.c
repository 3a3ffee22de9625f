/* Processes that live: they map, unmap, remap, fork, execute and die at random, while devices read and write the same
 * memory by plain pointers. Each knows what every word of its memory must be, and looks, by itself and by a device. A
 * stale byte is one that is something else.
 *
 *   life run SECONDS PROCESSES SEED   keeps so many processes alive, kills some, prints what they did as one line of JSON
 *   life once SEED                    one of them; prints the seed if it finds something wrong
 *
 * To see it fail: without invalidation in the agent's `see_off`, the first wrong word was found within seconds, and then
 * the agent itself was hit.
 */
#define _GNU_SOURCE
#include "gpu.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PIECES = 24, MAX_PAGES = 48, LARGE = 1 << 20, STEPS = 120, MAX_PROCESSES = 64 };

static uint64_t random_state;

static uint64_t mix(uint64_t word)
{
	word = (word ^ word >> 33) * 0xff51afd7ed558ccdU;
	word = (word ^ word >> 29) * 0xc4ceb9fe1a85ec53U;
	return word ^ word >> 32;
}

static uint64_t draw(uint64_t below)
{
	random_state += 0x9e3779b97f4a7c15U;
	return mix(random_state) % below;
}

/* What a piece of memory must hold: words that follow from a tag, or the same word everywhere. */
struct piece {
	uint64_t *at;
	size_t bytes;
	uint64_t tag;
	size_t from; /* the word of the tag that the first word is */
	int constant;
	int mapped; /* by mmap; else by malloc */
};

static struct piece pieces[PIECES];
static int count;
static uint64_t given_seed;

static void wrong(const char *what, const struct piece *piece, size_t word)
{
	printf("WRONG: seed %llu, process %d: %s: word %zu of %zu bytes at %p\n", (unsigned long long)given_seed,
	       (int)getpid(), what, word, piece->bytes, (void *)piece->at);
	fflush(stdout);
	_exit(3);
}

static void failed(const char *what)
{
	printf("FAILED: seed %llu: %s: %s\n", (unsigned long long)given_seed, what, gpu_why());
	fflush(stdout);
	_exit(4);
}

static uint64_t word_of(const struct piece *piece, size_t index)
{
	return piece->constant ? piece->tag : mix(piece->tag + piece->from + index);
}

static void write_all(struct piece *piece)
{
	piece->tag = draw(UINT64_MAX);
	piece->from = 0;
	piece->constant = 0;
	for (size_t i = 0; i < piece->bytes / 8; i++)
		piece->at[i] = word_of(piece, i);
}

static void look(const struct piece *piece, const char *what)
{
	for (size_t i = 0; i < piece->bytes / 8; i++)
		if (piece->at[i] != word_of(piece, i))
			wrong(what, piece, i);
}

static void look_by_device(const struct piece *piece, const char *what)
{
	uint64_t expected = 0, sum = 0;

	for (size_t i = 0; i < piece->bytes / 8; i++)
		expected += word_of(piece, i);
	if (gpu_sum(piece->at, piece->bytes, &sum) < 0)
		failed(what);
	if (sum != expected)
		wrong(what, piece, 0);
}

static void fill_by_device(struct piece *piece)
{
	uint64_t word = draw(UINT64_MAX);

	if (gpu_fill(piece->at, piece->bytes, word) < 0)
		failed("a fill");
	piece->tag = word;
	piece->constant = 1;
	look(piece, "after a fill by the device");
}

static void add(void *at, size_t bytes, int mapped)
{
	struct piece *piece = &pieces[count++];

	*piece = (struct piece){ .at = at, .bytes = bytes, .constant = 1, .mapped = mapped };
	if (mapped)
		look(piece, "new memory");
	write_all(piece);
}

static void add_some(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	size_t bytes = (1 + draw(MAX_PAGES)) * PAGE;
	void *at;

	if (count == PIECES)
		return;
	switch (draw(4)) {
	case 0:
		bytes = (1 + draw(200)) * 16;
		at = malloc(bytes);
		if (at != NULL)
			add(at, bytes, 0);
		return;
	case 1:
		at = malloc(LARGE + bytes);
		if (at != NULL)
			add(at, LARGE + bytes, 0);
		return;
	default:
		at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
		if (at != MAP_FAILED)
			add(at, bytes, 1);
	}
}

static void forget(int index)
{
	pieces[index] = pieces[--count];
}

static void take_away(int index)
{
	struct piece *piece = &pieces[index];
	struct gpu_job *job = NULL;

	/* Sometimes while a device writes there: the job may end well or not, but it writes nowhere else. */
	if (draw(3) == 0 && piece->mapped)
		job = gpu_begin_fill(piece->at, piece->bytes, draw(UINT64_MAX));
	if (piece->mapped)
		munmap(piece->at, piece->bytes);
	else
		free(piece->at);
	if (job != NULL)
		gpu_end(job);
	forget(index);
}

/* A hole in the middle, and sometimes new memory in it. */
static void take_part_away(int index)
{
	struct piece *piece = &pieces[index], rest;
	size_t pages = piece->bytes / PAGE, first, holes;
	char *hole;

	if (!piece->mapped || pages < 3 || count + 2 > PIECES)
		return;
	first = 1 + draw(pages - 2);
	holes = 1 + draw(pages - first - 1);
	hole = (char *)piece->at + first * PAGE;
	rest = *piece;
	rest.at = (uint64_t *)(hole + holes * PAGE);
	rest.bytes = (pages - first - holes) * PAGE;
	rest.from += (first + holes) * (PAGE / 8);
	piece->bytes = first * PAGE;
	if (draw(2) == 0) {
		munmap(hole, holes * PAGE);
		pieces[count++] = rest;
		return;
	}
	if (mmap(hole, holes * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != hole)
		_exit(5);
	pieces[count++] = rest;
	add(hole, holes * PAGE, 1);
}

static void resize(int index)
{
	struct piece *piece = &pieces[index];
	size_t bytes = (1 + draw(MAX_PAGES)) * PAGE, kept = bytes < piece->bytes ? bytes : piece->bytes;
	void *at;

	if (piece->mapped)
		at = mremap(piece->at, piece->bytes, bytes, MREMAP_MAYMOVE);
	else
		at = realloc(piece->at, bytes);
	if (at == MAP_FAILED || at == NULL)
		return;
	piece->at = at;
	piece->bytes = kept;
	look(piece, "after a move");
	look_by_device(piece, "after a move, by the device");
	piece->bytes = bytes;
	write_all(piece);
}

static void drop_contents(int index)
{
	struct piece *piece = &pieces[index];

	if (!piece->mapped)
		return;
	if (madvise(piece->at, piece->bytes, MADV_DONTNEED) != 0)
		return;
	piece->tag = 0;
	piece->constant = 1;
	look(piece, "after MADV_DONTNEED");
	look_by_device(piece, "after MADV_DONTNEED, by the device");
}

/* Both keep a right view: the child of the moment of the fork, the parent of its own. */
static void have_a_child(void)
{
	int status;
	pid_t child;

	fflush(stdout);
	child = fork();
	if (child < 0)
		return;
	if (child == 0) {
		gpu_open();
		for (int i = 0; i < count; i++) {
			look(&pieces[i], "in a child");
			look_by_device(&pieces[i], "in a child, by the device");
			fill_by_device(&pieces[i]);
		}
		_exit(0);
	}
	for (int i = 0; i < count; i++)
		if (i % 2 == 0)
			fill_by_device(&pieces[i]);
	if (waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) != 0)
		_exit(WEXITSTATUS(status));
	for (int i = 0; i < count; i++)
		look_by_device(&pieces[i], "after a child");
}

static atomic_int enough;

/* Keeps a device busy with memory that stays. */
static void *watch(void *unused)
{
	enum { WORDS = 4096 };
	uint64_t *words = malloc(WORDS * 8), expected = 0, sum;

	for (size_t i = 0; words != NULL && i < WORDS; i++)
		expected += words[i] = mix(given_seed + i);
	while (words != NULL && !enough) {
		if (gpu_sum(words, WORDS * 8, &sum) < 0)
			failed("a sum beside");
		if (sum != expected)
			wrong("memory that nobody changes", &(struct piece){ .at = words, .bytes = WORDS * 8 }, 0);
	}
	free(words);
	return unused;
}

static int live(uint64_t seed)
{
	pthread_t thread;

	given_seed = seed;
	random_state = mix(seed);
	gpu_open();
	if (pthread_create(&thread, NULL, watch, NULL) != 0)
		return 5;
	for (int step = 0; step < STEPS; step++) {
		int index = count > 0 ? (int)draw(count) : -1;
		uint64_t what = draw(20);

		if (index < 0 || what < 6)
			add_some();
		else if (what < 9)
			look_by_device(&pieces[index], "by the device");
		else if (what < 12)
			fill_by_device(&pieces[index]);
		else if (what < 14)
			take_away(index);
		else if (what < 16)
			take_part_away(index);
		else if (what < 17)
			resize(index);
		else if (what < 18)
			drop_contents(index);
		else if (what < 19 && step % 4 == 0)
			have_a_child();
		else
			look(&pieces[index], "by the process");
	}
	for (int i = 0; i < count; i++) {
		look(&pieces[i], "at the end");
		look_by_device(&pieces[i], "at the end, by the device");
	}
	enough = 1;
	pthread_join(thread, NULL);
	return 0;
}

static pid_t start_one(uint64_t seed)
{
	pid_t child;
	char text[32];

	fflush(stdout);
	child = fork();
	if (child != 0)
		return child;
	snprintf(text, sizeof(text), "%llu", (unsigned long long)seed);
	execl("/proc/self/exe", "life", "once", text, (char *)NULL);
	_exit(5);
}

static int run(long seconds, int processes, uint64_t seed)
{
	time_t end = time(NULL) + seconds;
	unsigned long lives = 0, kills = 0, bad = 0;
	pid_t children[MAX_PROCESSES];

	random_state = seed;
	for (int i = 0; i < processes; i++)
		children[i] = start_one(draw(UINT64_MAX));
	while (time(NULL) < end) {
		struct timespec pause = { .tv_nsec = 20000000 };

		nanosleep(&pause, NULL);
		for (int i = 0; i < processes; i++) {
			int status, killed = draw(100) == 0;

			if (killed)
				kill(children[i], SIGKILL);
			if (waitpid(children[i], &status, killed ? 0 : WNOHANG) != children[i])
				continue;
			lives++;
			if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
				kills++;
			else if (status != 0)
				bad++;
			children[i] = start_one(draw(UINT64_MAX));
		}
	}
	for (int i = 0; i < processes; i++) {
		int status;

		if (waitpid(children[i], &status, 0) == children[i]) {
			lives++;
			bad += status != 0;
		}
	}
	printf("{\"seed\": %llu, \"lives\": %lu, \"killed\": %lu, \"bad\": %lu}\n", (unsigned long long)seed, lives,
	       kills, bad);
	return bad != 0;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 3 && strcmp(argv[1], "once") == 0)
		return live(strtoull(argv[2], NULL, 10));
	if (argc == 5 && strcmp(argv[1], "run") == 0) {
		int processes = atoi(argv[3]);

		if (processes >= 1 && processes <= MAX_PROCESSES)
			return run(atol(argv[2]), processes, strtoull(argv[4], NULL, 10));
	}
	fprintf(stderr, "usage: life run SECONDS PROCESSES SEED | life once SEED\n");
	return 2;
}
