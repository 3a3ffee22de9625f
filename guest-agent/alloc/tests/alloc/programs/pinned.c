/* Memory that only a trusted process brings into the reach of GPUs. Each is told by name; all have whole pages. */
#define _GNU_SOURCE
#include "told.h"

#include <errno.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>

enum { PAGE = 4096, PAGES = 4, HUGE = 2 << 20 };

static void fill(void *at, size_t bytes, uint64_t value)
{
	for (size_t page = 0; page < bytes / PAGE; page++)
		*(volatile uint64_t *)((char *)at + page * PAGE) = value + page;
}

static void check(const void *at, size_t bytes, uint64_t value)
{
	for (size_t page = 0; page < bytes / PAGE; page++)
		CHECK(*(volatile uint64_t *)((char *)at + page * PAGE) == value + page);
}

static void *mapped(size_t bytes, int flags)
{
	return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

int main(void)
{
	char stack[(PAGES + 1) * PAGE];
	char *local = (char *)(((uintptr_t)stack + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	char *broken, *huge, *high, *segment, *moved;
	int id, status;
	pid_t child;

	/* The break may be anywhere in a page. */
	CHECK(sbrk(100) != (void *)-1);
	broken = sbrk(PAGES * PAGE);
	CHECK(broken != (void *)-1);
	broken = (char *)(((uintptr_t)broken + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	high = mapped(PAGES * PAGE, MAP_STACK);
	CHECK(high != MAP_FAILED);
	id = shmget(IPC_PRIVATE, PAGES * PAGE - 1, 0600);
	CHECK(id >= 0);
	segment = shmat(id, NULL, 0);
	CHECK(segment != (void *)-1);
	CHECK(shmctl(id, IPC_RMID, NULL) == 0);
	huge = mapped(HUGE, MAP_HUGETLB);
	fill(local, PAGES * PAGE, 100);
	fill(broken, PAGES * PAGE, 200);
	fill(high, PAGES * PAGE, 300);
	fill(segment, PAGES * PAGE, 400);
	tell_address("stack", local);
	tell_address("break", broken);
	tell_address("high", high);
	tell_address("segment", segment);
	/* Copies of huge pages need as many free ones. */
	tell("huge", huge == MAP_FAILED ? 0 : (uintptr_t)huge);
	await();
	if (huge != MAP_FAILED)
		CHECK(munmap(huge, HUGE) == 0);

	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		check(local, PAGES * PAGE, 100);
		check(broken, PAGES * PAGE, 200);
		check(high, PAGES * PAGE, 300);
		fill(local, PAGES * PAGE, 1100);
		fill(broken, PAGES * PAGE, 1200);
		fill(high, PAGES * PAGE, 1300);
		fill(segment, PAGES * PAGE, 1400);
		tell("child", getpid());
		await();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	check(local, PAGES * PAGE, 100);
	check(broken, PAGES * PAGE, 200);
	check(high, PAGES * PAGE, 300);
	check(segment, PAGES * PAGE, 1400);
	fill(local, PAGES * PAGE, 100);
	fill(broken, PAGES * PAGE, 200);
	tell("parent", getpid());
	await();

	/* What is given up is zeros, in the pages that GPUs know; shared memory gives nothing up. */
	CHECK(madvise(broken, 2 * PAGE, MADV_DONTNEED) == 0);
	CHECK(*(volatile uint64_t *)broken == 0 && *(volatile uint64_t *)(broken + PAGE) == 0);
	check(broken + 2 * PAGE, PAGE, 202);
	CHECK(madvise(segment, PAGES * PAGE, MADV_DONTNEED) == 0);
	check(segment, PAGES * PAGE, 1400);
	tell("cleared", 0);
	await();

	/* Shorter and longer again. */
	CHECK(sbrk(-2 * PAGE) != (void *)-1);
	tell("lower", 0);
	await();
	CHECK(brk((char *)sbrk(0) + 2 * PAGE) == 0);
	check(broken + 2 * PAGE, PAGE, 0);
	tell("higher", 0);
	await();

	CHECK(mprotect(high, PAGE, PROT_READ) == 0);
	CHECK(munmap(high + PAGE, PAGE) == 0);
	CHECK(mmap(high + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	      high + 2 * PAGE);
	fill(high + 2 * PAGE, PAGE, 777);
	moved = mremap(high + 3 * PAGE, PAGE, 3 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED && moved != high + 3 * PAGE);
	check(moved, PAGE, 303);
	tell_address("moved", moved);
	CHECK(shmdt(segment) == 0);
	CHECK(shmdt(segment) == -1 && errno == EINVAL);
	tell("detached", 0);
	await();
	return 0;
}
