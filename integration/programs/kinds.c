/* Memory of every kind that a Linux program has. For each, a line: whether a device reads what the process wrote there,
 * and the process what the device wrote; or else why not. Nothing here knows of arenas.
 *
 * Arguments: a folder on tmpfs, a folder on another file system. */
#define _GNU_SOURCE
#include "gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 64 << 10, HUGE = 2 << 20 };

static uint64_t seed = 1;

static uint64_t word_of(size_t index)
{
	uint64_t word = seed + index;

	word = (word ^ word >> 33) * 0xff51afd7ed558ccdU;
	return word ^ word >> 29;
}

static void cannot(const char *kind, const char *what)
{
	printf("%s: not tested: %s: %s\n", kind, what, strerror(errno));
}

/* The device reads: 1 if it sees what the process wrote. */
static int reads(const char *kind, const void *at, size_t bytes)
{
	const uint64_t *words = at;
	uint64_t expected = 0, sum = 0;
	int status;

	for (size_t i = 0; i < bytes / 8; i++)
		expected += words[i];
	status = gpu_sum(at, bytes, &sum);
	if (status < 0) {
		printf("%s: refused: %s\n", kind, gpu_why());
		return 0;
	}
	if (sum != expected) {
		printf("%s: WRONG: the device read another sum\n", kind);
		return 0;
	}
	return 1;
}

/* The device writes: 1 if the process sees it, and nothing else has changed. */
static int writes(const char *kind, void *at, size_t bytes)
{
	uint64_t *words = at, word = word_of(bytes);
	size_t half = bytes / 16;
	int status = gpu_fill(at, half * 8, word);

	if (status < 0) {
		printf("%s: refused: %s\n", kind, gpu_why());
		return 0;
	}
	for (size_t i = 0; i < bytes / 8; i++)
		if (words[i] != (i < half ? word : word_of(i))) {
			printf("%s: WRONG: word %zu is not as it must be\n", kind, i);
			return 0;
		}
	return 1;
}

static int works(const char *kind, void *at, size_t bytes)
{
	uint64_t *words = at;

	seed++;
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = word_of(i);
	return reads(kind, at, bytes) && writes(kind, at, bytes);
}

static void check(const char *kind, void *at, size_t bytes)
{
	if (works(kind, at, bytes))
		printf("%s: works\n", kind);
}

/* From malloc. */

static void *early;

__attribute__((constructor)) static void before_main(void)
{
	early = malloc(BYTES);
}

static void blocks(void)
{
	enum { SMALL = 64, COUNT = 500 };
	void *small[COUNT], *large, *moved, *aligned;
	int good = 1;

	for (int i = 0; i < COUNT; i++)
		small[i] = malloc(SMALL);
	for (int i = 0; i < COUNT && good; i++)
		good = works("malloc, small", small[i], SMALL);
	if (good)
		printf("malloc, small: works\n");
	for (int i = 0; i < COUNT; i++)
		free(small[i]);
	large = malloc(3 << 20);
	check("malloc, large", large, 3 << 20);
	moved = realloc(large, 5 << 20);
	check("realloc", moved, 5 << 20);
	free(moved);
	aligned = aligned_alloc(BYTES, BYTES);
	check("aligned_alloc", aligned, BYTES);
	free(aligned);
	check("malloc before main", early, BYTES);
}

/* Globals and stacks. */

static uint64_t with_value[BYTES / 8] = { 1 };
static uint64_t without[BYTES / 8];

static void *on_thread(void *unused)
{
	uint64_t local[2048];

	check("stack of a thread", local, sizeof(local));
	return unused;
}

static void globals_and_stacks(void)
{
	uint64_t local[256];
	pthread_t thread;

	check("global with a value", with_value, sizeof(with_value));
	check("global without", without, sizeof(without));
	if (pthread_create(&thread, NULL, on_thread, NULL) == 0)
		pthread_join(thread, NULL);
	check("stack of main", local, sizeof(local));
}

/* From mmap. */

static void mapped(const char *kind, size_t bytes, int prot, int flags, int fd)
{
	void *at = mmap(NULL, bytes, prot, flags, fd, 0);

	if (at == MAP_FAILED) {
		cannot(kind, "mmap");
		return;
	}
	if (prot & PROT_WRITE)
		check(kind, at, bytes);
	else if (reads(kind, at, bytes))
		printf("%s: works\n", kind);
	munmap(at, bytes);
}

static void anonymous(void)
{
	const int both = PROT_READ | PROT_WRITE, private = MAP_PRIVATE | MAP_ANONYMOUS;
	void *at, *end;
	int fd;

	mapped("mmap, anonymous", BYTES, both, private, -1);
	mapped("mmap, anonymous, 16 MiB", 16 << 20, both, private, -1);
	mapped("mmap, anonymous and shared", BYTES, both, MAP_SHARED | MAP_ANONYMOUS, -1);
	mapped("huge pages (MAP_HUGETLB)", HUGE, both, private | MAP_HUGETLB, -1);
	fd = memfd_create("kinds", MFD_CLOEXEC | MFD_HUGETLB);
	if (fd < 0 || ftruncate(fd, HUGE) != 0)
		cannot("huge pages (MFD_HUGETLB)", "memfd_create");
	else
		mapped("huge pages (MFD_HUGETLB)", HUGE, both, MAP_SHARED, fd);
	close(fd);
	at = mmap(NULL, 2 * HUGE, both, private, -1, 0);
	if (at == MAP_FAILED || madvise(at, 2 * HUGE, MADV_HUGEPAGE) != 0)
		cannot("huge pages (MADV_HUGEPAGE)", "madvise");
	else
		check("huge pages (MADV_HUGEPAGE)", at, 2 * HUGE);
	end = sbrk(BYTES);
	if (end == (void *)-1)
		cannot("sbrk", "sbrk");
	else
		check("sbrk", (void *)(((uintptr_t)end + 4095) & ~(uintptr_t)4095), BYTES / 2);
}

static int filled(const char *folder, const char *name)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	for (size_t i = 0; fd >= 0 && i < BYTES / 8; i++) {
		uint64_t word = word_of(i);

		if (write(fd, &word, sizeof(word)) != sizeof(word))
			return -1;
	}
	return fd;
}

static void files(const char *where, const char *folder)
{
	const int both = PROT_READ | PROT_WRITE;
	char kind[128];
	int fd = filled(folder, "kinds");

	if (fd < 0) {
		cannot(where, "open");
		return;
	}
	snprintf(kind, sizeof(kind), "file on %s, shared", where);
	mapped(kind, BYTES, both, MAP_SHARED, fd);
	snprintf(kind, sizeof(kind), "file on %s, shared, read only", where);
	mapped(kind, BYTES, PROT_READ, MAP_SHARED, fd);
	snprintf(kind, sizeof(kind), "file on %s, private", where);
	mapped(kind, BYTES, both, MAP_PRIVATE, fd);
	snprintf(kind, sizeof(kind), "file on %s, private, read only", where);
	mapped(kind, BYTES, PROT_READ, MAP_PRIVATE, fd);
	close(fd);
}

static void shared_memory(void)
{
	const int both = PROT_READ | PROT_WRITE;
	int fd = memfd_create("kinds", MFD_CLOEXEC), id;
	void *at;

	if (fd < 0 || ftruncate(fd, BYTES) != 0)
		cannot("memfd", "memfd_create");
	else
		mapped("memfd", BYTES, both, MAP_SHARED, fd);
	close(fd);
	fd = shm_open("/kinds", O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, BYTES) != 0)
		cannot("POSIX shared memory", "shm_open");
	else
		mapped("POSIX shared memory", BYTES, both, MAP_SHARED, fd);
	close(fd);
	shm_unlink("/kinds");
	id = shmget(IPC_PRIVATE, BYTES, 0600);
	at = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
	if (at == (void *)-1) {
		cannot("System V shared memory", "shmat");
		return;
	}
	check("System V shared memory", at, BYTES);
	shmdt(at);
	shmctl(id, IPC_RMID, NULL);
}

/* A child has its device write to memory that both have; this process has its own read it. */
static void two_processes(void)
{
	const char *kind = "shared by two processes";
	uint64_t *at = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t word = word_of(7), sum = 0;
	int status;
	pid_t child;

	if (at == MAP_FAILED) {
		cannot(kind, "mmap");
		return;
	}
	fflush(stdout);
	child = fork();
	if (child == 0) {
		gpu_open();
		if (gpu_fill(at, BYTES, word) < 0) {
			printf("%s: refused: %s\n", kind, gpu_why());
			fflush(stdout);
			_exit(1);
		}
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child) {
		cannot(kind, "fork");
		return;
	}
	if (status != 0)
		return;
	if (gpu_sum(at, BYTES, &sum) < 0)
		printf("%s: refused: %s\n", kind, gpu_why());
	else if (sum != word * (BYTES / 8) || at[0] != word)
		printf("%s: WRONG: this process does not see what the other's device wrote\n", kind);
	else
		printf("%s: works\n", kind);
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: kinds TMPFS_FOLDER OTHER_FOLDER\n");
		return 2;
	}
	gpu_open();
	blocks();
	globals_and_stacks();
	anonymous();
	shared_memory();
	files("tmpfs", argv[1]);
	files("another file system", argv[2]);
	two_processes();
	printf("done\n");
	return 0;
}
