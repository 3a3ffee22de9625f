/* What faults and pins cost in this guest, as one line of JSON; times in nanoseconds.
 *
 *   faults ROUNDS
 *
 * The reference is a bare userfaultfd loop: a thread touches a page, another one answers it. Beside it a device touches a
 * window of memory for the first time, and one that is there already. */
#define _GNU_SOURCE
#include "gpu.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WINDOW = 16 * PAGE, PINNED = 16 << 20 };

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static int compare(const void *left, const void *right)
{
	const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return a < b ? -1 : a > b;
}

static void tell(const char *name, uint64_t *times, size_t count)
{
	uint64_t sum = 0;

	qsort(times, count, sizeof(*times), compare);
	for (size_t i = 0; i < count; i++)
		sum += times[i];
	printf("\"%s\": {\"p50\": %llu, \"p99\": %llu, \"mean\": %llu}, ", name, (unsigned long long)times[count / 2],
	       (unsigned long long)times[count * 99 / 100], (unsigned long long)(sum / count));
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
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

static void by_userfaultfd(uint64_t *times, size_t rounds)
{
	/* By hand, so that it is no arena. */
	char *at = (char *)syscall(SYS_mmap, NULL, rounds * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				   -1, 0);
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = {
		.range = { .start = (uintptr_t)at, .len = rounds * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	pthread_t thread;

	if (at == MAP_FAILED || fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0 || ioctl(fd, UFFDIO_REGISTER, &area) != 0)
		fail("userfaultfd");
	if (pthread_create(&thread, NULL, answer, &fd) != 0)
		fail("pthread_create");
	for (size_t i = 0; i < rounds; i++) {
		uint64_t begin = now();

		*(volatile char *)(at + i * PAGE);
		times[i] = now() - begin;
	}
	/* The thread waits for another fault until the program ends. */
}

static void by_device(const char *memory, size_t step, uint64_t *times, size_t rounds)
{
	uint64_t sum;

	for (size_t i = 0; i < rounds; i++) {
		uint64_t begin = now();

		if (gpu_sum(memory + i * step, 8, &sum) < 0) {
			fprintf(stderr, "faults: %s\n", gpu_why());
			exit(1);
		}
		times[i] = now() - begin;
	}
}

int main(int argc, char **argv)
{
	size_t rounds = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	uint64_t *times = calloc(rounds + 100, sizeof(*times)), begin, pinned;
	char *memory = calloc(rounds, WINDOW);
	void *fresh;

	if (rounds == 0 || times == NULL || memory == NULL) {
		fprintf(stderr, "usage: faults ROUNDS\n");
		return 2;
	}
	gpu_open();
	/* What the job itself needs is there then. */
	by_device((char *)times, 0, times, 100);
	printf("{");
	by_userfaultfd(times, rounds);
	tell("userfaultfd", times, rounds);
	by_device(memory, WINDOW, times, rounds);
	tell("first_touch", times, rounds);
	by_device(memory, WINDOW, times, rounds);
	tell("touch", times, rounds);
	begin = now();
	fresh = mmap(NULL, PINNED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pinned = now() - begin;
	if (fresh == MAP_FAILED)
		fail("mmap");
	printf("\"pin_ns_per_page\": %llu}\n", (unsigned long long)(pinned / (PINNED / PAGE)));
	return 0;
}
