/* What faults cost in this guest, as one line of JSON: every time in nanoseconds.
 *
 *   faults one ROUNDS               one fault at a time
 *   faults storm PROCESSES ROUNDS   so many processes at once, each with WINDOWS faults in a round
 *
 * The reference is a bare userfaultfd loop: a thread touches a page, another one of its process answers. Beside it a device
 * touches windows of memory for the first time, and some that are there already. Both meet the same conditions: they take
 * turns, fault by fault or round by round. */
#define _GNU_SOURCE
#include "../../guest-agent/alloc/tests/alloc/programs/raw.h"
#include "gpu.h"
#include "samples.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The agent answers a fault with its window: 16 pages, aligned to as many. */
enum { PAGE = 4096, WINDOW = 16 * PAGE, WINDOWS = 128, MAX_PROCESSES = 64, MAX_ROUNDS = 2000 };

/* Memory that is no arena: what the library would do with it is not measured here. */
static char *by_hand(size_t bytes, int sharing)
{
	void *at = (void *)raw_call(SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

static void *answer(void *argument)
{
	int fd = *(int *)argument;
	struct uffd_msg event;

	while (read(fd, &event, sizeof(event)) == sizeof(event)) {
		struct uffdio_zeropage zero = {
			.range = { .start = event.arg.pagefault.address & ~(uint64_t)(PAGE - 1), .len = PAGE },
		};

		if (ioctl(fd, UFFDIO_ZEROPAGE, &zero) != 0)
			fail("UFFDIO_ZEROPAGE");
	}
	return NULL;
}

/* Pages that a thread answers until the process ends. */
static char *followed(size_t pages)
{
	static int fd;
	char *at = by_hand(pages * PAGE, MAP_PRIVATE);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = {
		.range = { .start = (uintptr_t)at, .len = pages * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	pthread_t thread;

	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0 || ioctl(fd, UFFDIO_REGISTER, &area) != 0)
		fail("userfaultfd");
	if (pthread_create(&thread, NULL, answer, &fd) != 0)
		fail("pthread_create");
	return at;
}

static void touch(const char *at)
{
	*(const volatile char *)at;
}

static _Noreturn void give_up(void)
{
	fprintf(stderr, "faults: %s\n", gpu_why());
	exit(1);
}

/* Aligned as windows are, so that each holds one. */
static char *windows(size_t count)
{
	char *at = aligned_alloc(WINDOW, count * WINDOW);

	if (at == NULL)
		fail("aligned_alloc");
	return at;
}

static uint64_t by_device(const char *at)
{
	uint64_t begin = now(), sum;

	if (gpu_sum(at, 8, &sum) < 0)
		give_up();
	return now() - begin;
}

static int one(size_t rounds)
{
	static uint64_t loop[MAX_ROUNDS], first[MAX_ROUNDS], again[MAX_ROUNDS];
	char *pages = followed(rounds), *memory = windows(rounds);

	gpu_open();
	/* What the job itself needs is there then. */
	for (size_t i = 0; i < 100; i++)
		by_device((char *)loop);
	for (size_t i = 0; i < rounds; i++) {
		uint64_t begin = now();

		touch(pages + i * PAGE);
		loop[i] = now() - begin;
		first[i] = by_device(memory + i * WINDOW);
		again[i] = by_device(memory + i * WINDOW);
	}
	printf("{");
	tell("userfaultfd", loop, rounds, ", ");
	tell("first_touch", first, rounds, ", ");
	tell("touch", again, rounds, "}\n");
	return 0;
}

/* What the processes of a storm share. */
struct storm {
	pthread_barrier_t barrier;
	/* Of the round that is: when each process began and was through. */
	uint64_t began[MAX_PROCESSES], ended[MAX_PROCESSES];
	/* Of each round. */
	uint64_t loop[MAX_ROUNDS], device[MAX_ROUNDS];
};

/* From the first one's beginning to the last one's end. */
static uint64_t took(const struct storm *storm, size_t processes)
{
	uint64_t began = storm->began[0], ended = storm->ended[0];

	for (size_t i = 1; i < processes; i++) {
		began = storm->began[i] < began ? storm->began[i] : began;
		ended = storm->ended[i] > ended ? storm->ended[i] : ended;
	}
	return ended - began;
}

static void take_part(struct storm *storm, size_t me, size_t processes, size_t rounds)
{
	char *pages = followed(WINDOWS);

	gpu_open();
	for (size_t round = 0; round < rounds; round++) {
		/* The device has seen none of it. */
		char *memory = windows(WINDOWS);

		if (raw_call(SYS_madvise, (long)pages, WINDOWS * PAGE, MADV_DONTNEED, 0, 0, 0) != 0)
			fail("madvise");

		pthread_barrier_wait(&storm->barrier);
		storm->began[me] = now();
		for (size_t i = 0; i < WINDOWS; i++)
			touch(pages + i * PAGE);
		storm->ended[me] = now();
		pthread_barrier_wait(&storm->barrier);
		if (me == 0)
			storm->loop[round] = took(storm, processes);

		pthread_barrier_wait(&storm->barrier);
		storm->began[me] = now();
		if (gpu_fill_each(memory, WINDOWS, WINDOW, round + 1) < 0)
			give_up();
		storm->ended[me] = now();
		pthread_barrier_wait(&storm->barrier);
		if (me == 0)
			storm->device[round] = took(storm, processes);
		for (size_t i = 0; i < WINDOWS; i++)
			if (*(uint64_t *)(memory + i * WINDOW) != round + 1) {
				fprintf(stderr, "faults: window %zu is not written\n", i);
				exit(1);
			}
		free(memory);
	}
}

static int storm(size_t processes, size_t rounds)
{
	struct storm *storm = (struct storm *)by_hand(sizeof(*storm), MAP_SHARED);
	pthread_barrierattr_t shared;
	pid_t children[MAX_PROCESSES];

	pthread_barrierattr_init(&shared);
	pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
	pthread_barrier_init(&storm->barrier, &shared, (unsigned)processes);
	for (size_t i = 0; i < processes; i++) {
		children[i] = fork();
		if (children[i] < 0)
			fail("fork");
		if (children[i] == 0) {
			take_part(storm, i, processes, rounds);
			exit(0);
		}
	}
	for (size_t i = 0; i < processes; i++) {
		int status;

		if (wait(&status) < 0)
			fail("wait");
		if (status != 0) {
			/* The others would wait for it for ever. */
			for (size_t other = 0; other < processes; other++)
				kill(children[other], SIGKILL);
			fprintf(stderr, "faults: a process of the storm has ended with status %#x\n", status);
			return 1;
		}
	}
	printf("{\"answers\": %zu, ", processes * WINDOWS);
	tell("userfaultfd", storm->loop, rounds, ", ");
	tell("device", storm->device, rounds, "}\n");
	return 0;
}

int main(int argc, char **argv)
{
	size_t first = argc > 2 ? strtoul(argv[2], NULL, 10) : 0, second = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;

	if (argc == 3 && strcmp(argv[1], "one") == 0 && first > 0 && first <= MAX_ROUNDS)
		return one(first);
	if (argc == 4 && strcmp(argv[1], "storm") == 0 && first > 0 && first <= MAX_PROCESSES && second > 0 &&
	    second <= MAX_ROUNDS)
		return storm(first, second);
	fprintf(stderr, "usage: faults one ROUNDS | faults storm PROCESSES ROUNDS\n");
	return 2;
}
