/* Memory that only a trusted process brings into the reach of GPUs. Each is told by name; all have whole pages. With an
 * argument the kernel is called by number. */
#define _GNU_SOURCE
#include "pages.h"

#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { PAGES = 4, HUGE = 2 << 20 };

/* Those that a fork copies, and a segment that it does not. */
static char *local, *broken, *high, *segment;

static int numbered;

static void set_all(uint64_t value)
{
	set_words(local, 0, PAGES, value + 100);
	set_words(broken, 0, PAGES, value + 200);
	set_words(high, 0, PAGES, value + 300);
	set_words(segment, 0, PAGES, value + 400);
}

static int private_as_set(void)
{
	return words_are(local, 0, PAGES, 100) && words_are(broken, 0, PAGES, 200) && words_are(high, 0, PAGES, 300);
}

static char *page_from(char *at)
{
	return (char *)(((uintptr_t)at + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
}

static void *mapped(size_t bytes, int flags)
{
	return mmap(NULL, bytes, RW, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

/* Returns where the break was. */
static char *move_break(long by)
{
	char *before;
	if (!numbered)
		return sbrk(by);
	before = (char *)syscall(SYS_brk, 0);
	CHECK((char *)syscall(SYS_brk, before + by) == before + by);
	return before;
}

static char *attach(int id)
{
	return numbered ? (char *)syscall(SYS_shmat, id, NULL, 0) : shmat(id, NULL, 0);
}

static int detach(char *at)
{
	return numbered ? (int)syscall(SYS_shmdt, at) : shmdt(at);
}

int main(int argc, char **argv)
{
	char stack[(PAGES + 1) * PAGE];
	char *huge, *moved, *first = sbrk(0);
	int id, status;
	pid_t child;

	numbered = argc > 1;
	local = page_from(stack);
	/* The break may be anywhere in a page. */
	CHECK(move_break(100) != (void *)-1);
	broken = move_break(PAGES * PAGE);
	CHECK(broken != (void *)-1);
	broken = page_from(broken);
	/* Looks, and moves nothing. */
	CHECK(!numbered || sbrk(0) == first);
	high = mapped(PAGES * PAGE, MAP_STACK);
	CHECK(high != MAP_FAILED);
	id = shmget(IPC_PRIVATE, PAGES * PAGE - 1, 0600);
	CHECK(id >= 0);
	segment = attach(id);
	CHECK(segment != (void *)-1);
	CHECK(shmctl(id, IPC_RMID, NULL) == 0);
	huge = mapped(HUGE, MAP_HUGETLB);
	set_all(0);
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
		CHECK(private_as_set());
		set_all(1000);
		tell("child", getpid());
		await();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(private_as_set());
	CHECK(words_are(segment, 0, PAGES, 1400));
	set_words(local, 0, PAGES, 100);
	set_words(broken, 0, PAGES, 200);
	tell("parent", getpid());
	await();

	/* What is given up is zeros, in the pages that GPUs know; shared memory gives nothing up. */
	CHECK(madvise(broken, 2 * PAGE, MADV_DONTNEED) == 0);
	CHECK(*word(broken, 0) == 0 && *word(broken, 1) == 0);
	CHECK(*word(broken, 2) == 202);
	CHECK(madvise(segment, PAGES * PAGE, MADV_DONTNEED) == 0);
	CHECK(words_are(segment, 0, PAGES, 1400));
	tell("cleared", 0);
	await();

	/* Shorter and longer again. */
	CHECK(move_break(-2 * (long)PAGE) != (void *)-1);
	tell("lower", 0);
	await();
	CHECK(numbered ? !!move_break(2 * PAGE) : brk((char *)sbrk(0) + 2 * PAGE) == 0);
	CHECK(*word(broken, 2) == 0);
	tell("higher", 0);
	await();

	CHECK(mprotect(high, PAGE, PROT_READ) == 0);
	CHECK(munmap(high + PAGE, PAGE) == 0);
	CHECK(mmap(high + 2 * PAGE, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	      high + 2 * PAGE);
	*word(high, 2) = 777;
	moved = mremap(high + 3 * PAGE, PAGE, 3 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED && moved != high + 3 * PAGE);
	CHECK(*word(moved, 0) == 303);
	tell_address("moved", moved);
	/* The C library goes on from where it was itself. */
	CHECK(!numbered || sbrk(PAGE) == first);
	CHECK(detach(segment) == 0);
	CHECK(detach(segment) == -1 && errno == EINVAL);
	tell("detached", 0);
	await();
	return 0;
}
