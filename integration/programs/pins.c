/* What pinned memory costs in this guest, as one line of JSON: every time in nanoseconds, of BYTES at a time.
 *
 *   pins ROUNDS   to be run by root, with `svm-agent run`
 *
 * A process that asks for a device for the first time has its memory brought into reach. From then on mmap gives memory of
 * an arena, and munmap returns when no device can reach it. Beside that, what the kernel alone takes: a bare mapping of
 * shared memory with all its pages, and their registration with an io_uring, which is how the agent pins. */
#define _GNU_SOURCE
#include "../../guest-agent/alloc/tests/alloc/programs/raw.h"
#include "samples.h"

#include <dlfcn.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, BYTES = 16 << 20, MAX_ROUNDS = 1000 };

static const int reach = PROT_READ | PROT_WRITE;

static void by_kernel(int ring, uint64_t *populate, uint64_t *pin, uint64_t *unpin, uint64_t *unmap)
{
	const int flags = MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE;
	uint64_t times[5];
	struct iovec all;
	void *at;

	times[0] = now();
	at = (void *)raw_call(SYS_mmap, 0, BYTES, reach, flags, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap by hand");
	times[1] = now();
	all = (struct iovec){ .iov_base = at, .iov_len = BYTES };
	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &all, 1) != 0)
		fail("IORING_REGISTER_BUFFERS");
	times[2] = now();
	if (syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) != 0)
		fail("IORING_UNREGISTER_BUFFERS");
	times[3] = now();
	if (raw_call(SYS_munmap, (long)at, BYTES, 0, 0, 0, 0) != 0)
		fail("munmap by hand");
	times[4] = now();
	*populate = times[1] - times[0];
	*pin = times[2] - times[1];
	*unpin = times[3] - times[2];
	*unmap = times[4] - times[3];
}

static void by_library(uint64_t *map, uint64_t *unmap)
{
	uint64_t begin = now(), mapped;
	void *at = mmap(NULL, BYTES, reach, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	mapped = now();
	if (at == MAP_FAILED)
		fail("mmap");
	*map = mapped - begin;
	begin = now();
	if (munmap(at, BYTES) != 0)
		fail("munmap");
	*unmap = now() - begin;
}

/* What svm_open asks of the library before all else. */
static void ask(void)
{
	char session[256];
	int (*of_process)(void *) = NULL;

	*(void **)&of_process = dlsym(RTLD_DEFAULT, "svm_alloc_session");
	if (of_process == NULL || of_process(session) != 0) {
		fprintf(stderr, "pins: no memory in reach: start it by `svm-agent run`\n");
		exit(1);
	}
}

/* The first time of a process that has so much memory of malloc: of a child, which has asked for nothing yet. */
static uint64_t asking(void)
{
	uint64_t *took = (void *)raw_call(SYS_mmap, 0, PAGE, reach, MAP_SHARED | MAP_ANONYMOUS, -1, 0), time;
	pid_t child;
	int status;

	if (took == MAP_FAILED)
		fail("mmap by hand");
	child = fork();
	if (child == 0) {
		*took = now();
		ask();
		*took = now() - *took;
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
		fail("a child that asks");
	time = *took;
	raw_call(SYS_munmap, (long)took, PAGE, 0, 0, 0, 0);
	return time;
}

int main(int argc, char **argv)
{
	static uint64_t asked[MAX_ROUNDS], populate[MAX_ROUNDS], pin[MAX_ROUNDS], unpin[MAX_ROUNDS], unmap[MAX_ROUNDS];
	static uint64_t arena[MAX_ROUNDS], arena_gone[MAX_ROUNDS];
	size_t rounds = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	char *had = malloc(BYTES);
	struct io_uring_params params;
	int ring;

	if (rounds == 0 || rounds > MAX_ROUNDS || had == NULL) {
		fprintf(stderr, "usage: pins ROUNDS\n");
		return 2;
	}
	memset(&params, 0, sizeof(params));
	ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0)
		fail("io_uring_setup");
	memset(had, 1, BYTES);
	for (size_t i = 0; i < rounds; i++)
		asked[i] = asking();
	free(had);
	ask();
	for (size_t i = 0; i < rounds; i++) {
		by_kernel(ring, &populate[i], &pin[i], &unpin[i], &unmap[i]);
		by_library(&arena[i], &arena_gone[i]);
	}
	printf("{\"bytes\": %d, ", BYTES);
	tell("asked", asked, rounds, ", ");
	tell("populate", populate, rounds, ", ");
	tell("pin", pin, rounds, ", ");
	tell("unpin", unpin, rounds, ", ");
	tell("unmap", unmap, rounds, ", ");
	tell("arena", arena, rounds, ", ");
	tell("arena_gone", arena_gone, rounds, "}\n");
	return 0;
}
