/* Memory of every kind that a Linux program has. For each, a line: whether a device reads what the process wrote there,
 * and the process what the device wrote; or else why not. Nothing here knows of arenas.
 *
 *	kinds all|late TMPFS_FOLDER OTHER_FOLDER LIBRARY OTHER_LIBRARY
 *	kinds first TMPFS_FOLDER
 *	kinds second TMPFS_FOLDER
 *
 * The libraries, of kinds_library.c, are loaded: one while there is one thread, the other while there are two. With `late`
 * the program has all memory before it asks for a device: for each, a forked child does. `first` and
 * `second` are programs that share memory: the first says where it has some, and that it waits; when the second has ended,
 * a line is to be written to the first. */
#define _GNU_SOURCE
#include "gpu.h"
#include "kinds.h"

#include <alloca.h>
#include <dlfcn.h>
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

enum { HUGE = 2 << 20, RESERVED = 64 << 20, MOST_OF_FILE = 64 << 20, STACK = 256 << 10 };

/* More than an agent gives a process, unless it is told otherwise. */
static const size_t beyond_limits = 257 << 20;

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

/* The same, for what a process does that asks for a device only now. */
static int in_child(int (*does)(const char *, void *, size_t), const char *kind, void *at, size_t bytes)
{
	int status = 0;
	pid_t child;

	fflush(stdout);
	child = fork();
	if (child == 0) {
		int good;

		gpu_open();
		good = does(kind, at, bytes);
		fflush(stdout);
		_exit(good);
	}
	if (child < 0 || waitpid(child, &status, 0) != child) {
		cannot(kind, "fork");
		return 0;
	}
	if (!WIFEXITED(status))
		printf("%s: WRONG: the process ended with status %#x\n", kind, status);
	return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static int late;

static int reads_and_writes(const char *kind, void *at, size_t bytes)
{
	return reads(kind, at, bytes) && writes(kind, at, bytes);
}

static int only_reads(const char *kind, void *at, size_t bytes)
{
	return reads(kind, at, bytes);
}

static int works(const char *kind, void *at, size_t bytes)
{
	uint64_t *words = at;

	seed++;
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = word_of(i);
	return late ? in_child(reads_and_writes, kind, at, bytes) : reads_and_writes(kind, at, bytes);
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
	for (int i = 0; i < COUNT && good; i += late ? COUNT / 10 : 1)
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

/* Globals of the program and of libraries. */

static uint64_t with_value[BYTES / 8] = { 1 };
static uint64_t without[BYTES / 8];

static void globals(void)
{
	check("global with a value", with_value, sizeof(with_value));
	check("global without", without, sizeof(without));
}

static void library(const char *which, const struct library *memory)
{
	char kind[128];

	snprintf(kind, sizeof(kind), "%s library, global with a value", which);
	check(kind, memory->value, BYTES);
	snprintf(kind, sizeof(kind), "%s library, global without", which);
	check(kind, memory->zero, BYTES);
	snprintf(kind, sizeof(kind), "%s library, block of its constructor", which);
	check(kind, memory->block, BYTES);
}

static const struct library *load(const char *path)
{
	void *loaded = dlopen(path, RTLD_NOW);
	const struct library *(*memory)(void) = NULL;

	if (loaded != NULL)
		*(void **)&memory = dlsym(loaded, "library_memory");
	if (memory == NULL) {
		printf("%s: not tested: %s\n", path, dlerror());
		return NULL;
	}
	return memory();
}

static void *until_unlocked(void *lock)
{
	pthread_mutex_lock(lock);
	pthread_mutex_unlock(lock);
	return NULL;
}

static void libraries(const char *path, const char *other_path)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	const struct library *memory;
	pthread_t thread;

	library("linked", library_memory());
	memory = load(path);
	if (memory != NULL)
		library("loaded", memory);
	pthread_mutex_lock(&lock);
	if (pthread_create(&thread, NULL, until_unlocked, &lock) != 0) {
		cannot("library loaded beside a thread", "pthread_create");
		return;
	}
	memory = load(other_path);
	if (memory != NULL)
		check("library loaded beside a thread, global with a value", memory->value, BYTES);
	pthread_mutex_unlock(&lock);
	pthread_join(thread, NULL);
}

/* Stacks. */

/* The part of this thread's stack from `low` up to `high`, or up to here. */
static __attribute__((noinline)) void stack(const char *kind, uintptr_t low, uintptr_t high)
{
	size_t room = (uintptr_t)__builtin_frame_address(0) - low;
	char *lowest = alloca(room);

	if (high == 0)
		high = (uintptr_t)lowest + room;
	check(kind, lowest + (low - (uintptr_t)lowest), (high - low) & -(size_t)16);
}

static void *on_thread(void *unused)
{
	pthread_attr_t attr;
	void *base = NULL;
	size_t bytes = 0;
	uintptr_t top;

	if (pthread_getattr_np(pthread_self(), &attr) != 0 || pthread_attr_getstack(&attr, &base, &bytes) != 0) {
		cannot("stack of a thread", "pthread_getattr_np");
		return unused;
	}
	pthread_attr_destroy(&attr);
	top = (uintptr_t)base + bytes;
	stack("stack of a thread, upper 256 KiB", top - STACK, 0);
	stack("stack of a thread, deeper", top - 2 * STACK, top - 2 * STACK + BYTES);
	return unused;
}

/* `top`: where the frame of main begins. */
static void stacks(uintptr_t top)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, on_thread, NULL) == 0)
		pthread_join(thread, NULL);
	top &= -(uintptr_t)16;
	stack("stack of main, 256 KiB", top - STACK, 0);
	stack("stack of main, deeper", top - 2 * STACK, top - 2 * STACK + BYTES);
}

/* From mmap. */

enum { READ_WRITE = PROT_READ | PROT_WRITE, ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS };

static void mapped(const char *kind, size_t bytes, int prot, int flags, int fd)
{
	void *at = mmap(NULL, bytes, prot, flags, fd, 0);

	if (at == MAP_FAILED) {
		cannot(kind, "mmap");
		return;
	}
	if (prot & PROT_WRITE)
		check(kind, at, bytes);
	else if (late ? in_child(only_reads, kind, at, bytes) : reads(kind, at, bytes))
		printf("%s: works\n", kind);
	munmap(at, bytes);
}

/* The first part of a large mapping. */
static void large(const char *kind, size_t bytes, int flags, int fd)
{
	void *at = mmap(NULL, bytes, READ_WRITE, flags, fd, 0);

	if (at == MAP_FAILED) {
		cannot(kind, "mmap");
		return;
	}
	check(kind, at, BYTES);
	munmap(at, bytes);
}

/* Mapped as `first` says, then protected as `then`, and readable and writable at last. */
static void protected(const char *kind, int first, int then)
{
	void *at = mmap(NULL, BYTES, first, ANONYMOUS, -1, 0);

	if (at == MAP_FAILED || mprotect(at, BYTES, then) != 0 || mprotect(at, BYTES, READ_WRITE) != 0) {
		cannot(kind, "mprotect");
		return;
	}
	check(kind, at, BYTES);
	munmap(at, BYTES);
}

static void mapped_otherwise(void)
{
	protected("PROT_NONE, made writable", PROT_NONE, PROT_NONE);
	protected("PROT_READ, made writable", PROT_READ, PROT_READ);
	protected("protected, made writable again", READ_WRITE, PROT_READ);
	mapped("PROT_EXEC", BYTES, READ_WRITE | PROT_EXEC, ANONYMOUS, -1);
	large("MAP_NORESERVE, 64 MiB", RESERVED, ANONYMOUS | MAP_NORESERVE, -1);
	large("MAP_NORESERVE, more", RESERVED + BYTES, ANONYMOUS | MAP_NORESERVE, -1);
	mapped("MAP_GROWSDOWN", BYTES, READ_WRITE, ANONYMOUS | MAP_GROWSDOWN, -1);
	mapped("MAP_STACK", BYTES, READ_WRITE, ANONYMOUS | MAP_STACK, -1);
	large("mmap, beyond the agent's limit", beyond_limits, ANONYMOUS, -1);
}

static void anonymous(void)
{
	void *at, *end;
	int fd;

	mapped("mmap, anonymous", BYTES, READ_WRITE, ANONYMOUS, -1);
	mapped("mmap, anonymous, 16 MiB", 16 << 20, READ_WRITE, ANONYMOUS, -1);
	mapped("mmap, anonymous and shared", BYTES, READ_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	mapped("huge pages (MAP_HUGETLB)", HUGE, READ_WRITE, ANONYMOUS | MAP_HUGETLB, -1);
	fd = memfd_create("kinds", MFD_CLOEXEC | MFD_HUGETLB);
	if (fd < 0 || ftruncate(fd, HUGE) != 0)
		cannot("huge pages (MFD_HUGETLB)", "memfd_create");
	else
		mapped("huge pages (MFD_HUGETLB)", HUGE, READ_WRITE, MAP_SHARED, fd);
	close(fd);
	at = mmap(NULL, 2 * HUGE, READ_WRITE, ANONYMOUS, -1, 0);
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
	char kind[128];
	int fd = filled(folder, "kinds");

	if (fd < 0) {
		cannot(where, "open");
		return;
	}
	snprintf(kind, sizeof(kind), "file on %s, shared", where);
	mapped(kind, BYTES, READ_WRITE, MAP_SHARED, fd);
	snprintf(kind, sizeof(kind), "file on %s, shared, read only", where);
	mapped(kind, BYTES, PROT_READ, MAP_SHARED, fd);
	snprintf(kind, sizeof(kind), "file on %s, private", where);
	mapped(kind, BYTES, READ_WRITE, MAP_PRIVATE, fd);
	snprintf(kind, sizeof(kind), "file on %s, private, read only", where);
	mapped(kind, BYTES, PROT_READ, MAP_PRIVATE, fd);
	if (ftruncate(fd, MOST_OF_FILE + BYTES) != 0)
		cannot(where, "ftruncate");
	snprintf(kind, sizeof(kind), "file on %s, private, 64 MiB", where);
	large(kind, MOST_OF_FILE, MAP_PRIVATE, fd);
	snprintf(kind, sizeof(kind), "file on %s, private, more", where);
	large(kind, MOST_OF_FILE + BYTES, MAP_PRIVATE, fd);
	close(fd);
}

static void shared_memory(void)
{
	int fd = memfd_create("kinds", MFD_CLOEXEC), id;
	void *at;

	if (fd < 0 || ftruncate(fd, BYTES) != 0)
		cannot("memfd", "memfd_create");
	else
		mapped("memfd", BYTES, READ_WRITE, MAP_SHARED, fd);
	close(fd);
	fd = shm_open("/kinds", O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, BYTES) != 0)
		cannot("POSIX shared memory", "shm_open");
	else
		mapped("POSIX shared memory", BYTES, READ_WRITE, MAP_SHARED, fd);
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
static void parent_and_child(void)
{
	const char *kind = "shared by parent and child";
	uint64_t *at = mmap(NULL, BYTES, READ_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
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
	if (late)
		gpu_open();
	if (gpu_sum(at, BYTES, &sum) < 0)
		printf("%s: refused: %s\n", kind, gpu_why());
	else if (sum != word * (BYTES / 8) || at[0] != word)
		printf("%s: WRONG: this process does not see what the other's device wrote\n", kind);
	else
		printf("%s: works\n", kind);
}

/* Two programs, which know of each other's memory by a name only. */

enum { QUARTER = BYTES / 4 };

static uint64_t quarter_word(size_t quarter)
{
	return 0x0101010101010101U * (quarter + 1);
}

/* Whether this process and its device see the first quarters as they were written, and the rest as it was. */
static int sees(const char *kind, const uint64_t *at, size_t written)
{
	for (size_t i = 0; i < BYTES / 8; i++) {
		size_t quarter = i / (QUARTER / 8);

		if (at[i] != (quarter < written ? quarter_word(quarter) : word_of(i))) {
			printf("%s: WRONG: word %zu is not as it must be\n", kind, i);
			return 0;
		}
	}
	return reads(kind, at, BYTES);
}

static int fills(const char *kind, uint64_t *at, size_t quarter)
{
	if (gpu_fill(at + quarter * (QUARTER / 8), QUARTER, quarter_word(quarter)) == 0)
		return 1;
	printf("%s: refused: %s\n", kind, gpu_why());
	return 0;
}

/* The first quarter is filled by the first program's device, the second by the second program, the third by its device. */
static int begin(const char *kind, uint64_t *at)
{
	for (size_t i = 0; i < BYTES / 8; i++)
		at[i] = word_of(i);
	return fills(kind, at, 0);
}

static int answer(const char *kind, uint64_t *at)
{
	if (!sees(kind, at, 1))
		return 0;
	for (size_t i = 0; i < QUARTER / 8; i++)
		at[QUARTER / 8 + i] = quarter_word(1);
	return fills(kind, at, 2);
}

static uint64_t *shared(const char *kind, int fd)
{
	void *at = MAP_FAILED;

	if (fd >= 0 && ftruncate(fd, BYTES) == 0)
		at = mmap(NULL, BYTES, READ_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (at == MAP_FAILED) {
		cannot(kind, "mmap");
		exit(1);
	}
	return at;
}

static void two_programs(int first, const char *folder)
{
	const char *kinds[] = { "POSIX shared memory of two programs", "tmpfs file of two programs" };
	char name[64], path[256];
	uint64_t *at[2];
	int good[2];

	snprintf(name, sizeof(name), "/kinds-%u", getuid());
	snprintf(path, sizeof(path), "%s/kinds-file-%u", folder, getuid());
	at[0] = shared(kinds[0], shm_open(name, O_RDWR | O_CREAT, 0600));
	at[1] = shared(kinds[1], open(path, O_RDWR | O_CREAT, 0600));
	for (int i = 0; i < 2; i++)
		good[i] = first ? begin(kinds[i], at[i]) : answer(kinds[i], at[i]);
	if (first) {
		printf("it has %p\nit has %p\nit has %p\nit has %p\nit waits\n", (void *)at[0], (void *)at[1], early,
			(void *)with_value);
		fflush(stdout);
		getchar();
		shm_unlink(name);
		unlink(path);
		for (int i = 0; i < 2; i++)
			good[i] = good[i] && sees(kinds[i], at[i], 3);
	}
	for (int i = 0; i < 2; i++)
		if (good[i])
			printf("%s: works\n", kinds[i]);
}

int main(int argc, char **argv)
{
	int all = argc == 6 && (strcmp(argv[1], "all") == 0 || strcmp(argv[1], "late") == 0);
	int first = argc == 3 && strcmp(argv[1], "first") == 0;

	if (!all && !first && (argc != 3 || strcmp(argv[1], "second") != 0)) {
		fprintf(stderr, "usage: kinds all|late TMPFS_FOLDER OTHER_FOLDER LIBRARY OTHER_LIBRARY | first|second TMPFS_FOLDER\n");
		return 2;
	}
	late = all && strcmp(argv[1], "late") == 0;
	if (!late)
		gpu_open();
	if (all) {
		blocks();
		globals();
		libraries(argv[4], argv[5]);
		stacks((uintptr_t)__builtin_frame_address(0));
		anonymous();
		mapped_otherwise();
		shared_memory();
		files("tmpfs", argv[2]);
		files("another file system", argv[3]);
		parent_and_child();
	} else {
		two_programs(first, argv[2]);
	}
	printf("done\n");
	return 0;
}
