/* Memory that no GPU reaches: a job that touches it ends with what is wrong with it and what to do. Prints each. */
#define _GNU_SOURCE
#include "../../../../alloc/tests/alloc/programs/raw.h"
#include "check.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RW (PROT_READ | PROT_WRITE)
#define ANONYMOUS (MAP_PRIVATE | MAP_ANONYMOUS)
#define LEN ((size_t)65536)

static struct svm_mirror *mirror;

static void touch(const char *name, void *address)
{
	struct svm_packet fill;
	uint64_t at;

	CHECK(svm_device_address(mirror, address, &at) == 0);
	fill = svm_packet_fill(at, 8, 1);
	printf("%s: %s\n", name, svm_run(mirror, 0, &fill, 1) == 0 ? "works" : svm_error());
	fflush(stdout);
}

static char *map(size_t len, int prot, int flags)
{
	void *base = mmap(NULL, len, prot, ANONYMOUS | flags, -1, 0);

	CHECK(base != MAP_FAILED);
	return base;
}

/* Maps it, makes it readable and writable if it is not, and touches it. */
static void mapped(const char *name, size_t len, int prot, int flags)
{
	char *base = map(len, prot, flags);

	CHECK(prot == RW || mprotect(base, len, RW) == 0);
	touch(name, base + len - 4096);
	CHECK(munmap(base, len) == 0);
}

static uint64_t deeper(int depth)
{
	volatile uint64_t page[512] __attribute__((aligned(16)));

	page[0] = 1;
	if (depth == 0)
		touch("deep stack", (void *)&page[0]);
	return depth ? deeper(depth - 1) + page[0] : page[0];
}

static _Thread_local uint64_t of_thread;

static void *thread(void *unused)
{
	touch("top of a stack", &of_thread);
	CHECK(deeper(200) == 201);
	return unused;
}

static void kinds(void)
{
	pthread_t id;
	char *base;

	mapped("plain", LEN, RW, 0);
	mapped("none", LEN, PROT_NONE, 0);
	mapped("read-only", LEN, PROT_READ, 0);
	mapped("executable", LEN, RW | PROT_EXEC, 0);
	mapped("reserved", (size_t)65 << 20, RW, MAP_NORESERVE);
	mapped("reserved, few", LEN, RW, MAP_NORESERVE);
	mapped("for a stack", LEN, RW, MAP_STACK);
	mapped("grows down", LEN, RW, MAP_GROWSDOWN);
	/* What is wrong with memory is forgotten with it. */
	mapped("plain again", LEN, RW, 0);
	base = map(LEN, RW, 0);
	CHECK(mprotect(base + 4096, 4096, PROT_READ) == 0 && mprotect(base + 4096, 4096, RW) == 0);
	touch("beside it", base);
	touch("protected", base + 4096);
	/* Past the library. */
	base = (char *)raw_call(SYS_mmap, 0, LEN, RW, ANONYMOUS, -1, 0);
	CHECK(base != MAP_FAILED);
	touch("not seen", base);
	CHECK(mprotect(base, LEN, PROT_READ) == 0);
	touch("not writable", base);
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0 && pthread_join(id, NULL) == 0);
}

#define MIB ((size_t)1 << 20)

/* Pages of a memfd are the program's own, and pinned like others: 12 MiB of them, in pieces. */
static void shared(void)
{
	char *last = NULL;

	for (int n = 0; n < 12; n++) {
		int file = memfd_create("own", 0);
		CHECK(file >= 0 && ftruncate(file, MIB) == 0);
		last = mmap(NULL, MIB, RW, MAP_SHARED, file, 0);
		CHECK(last != MAP_FAILED && close(file) == 0);
	}
	touch("memfd", last);
}

static void private(void)
{
	char *large = malloc(8 * MIB);

	CHECK(large != NULL);
	touch("malloc", large + 4 * MIB);
	touch("mmap", map(8 * MIB, RW, 0));
}

int main(int argc, char **argv)
{
	struct svm *svm;

	CHECK(argc == 2);
	CHECK(svm_open(&svm) == 0 && svm_mirror(svm, 0, &mirror) == 0);
	if (strcmp(argv[1], "kinds") == 0)
		kinds();
	else if (strcmp(argv[1], "shared") == 0)
		shared();
	else
		private();
	svm_unmirror(mirror);
	svm_close(svm);
	return 0;
}
