/* mremap in all its ways. */
#define _GNU_SOURCE
#include "pages.h"

static void *remap(void *base, size_t pages, size_t new_pages, int flags, void *to)
{
	void *moved = mremap(base, pages * PAGE, new_pages * PAGE, flags, to);
	CHECK(moved != MAP_FAILED);
	return moved;
}

/* Addresses that nothing else takes. */
static char *reserved(size_t pages)
{
	char *base = mmap(NULL, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(base != MAP_FAILED);
	return base;
}

int main(void)
{
	char *base = reserved(40), *to = base + 20 * PAGE, *other, *plain;
	int fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	CHECK(mmap(base, 10 * PAGE, RW, fixed, -1, 0) == base);
	set_words(base, 0, 10, 100);

	CHECK(remap(base, 10, 10, 0, NULL) == base);
	CHECK(remap(base, 10, 6, 0, NULL) == base);
	tell_address("shrunk", base);
	await();
	CHECK(remap(base, 6, 9, 0, NULL) == base);
	CHECK(words_are(base, 0, 6, 1100) && is_zero(base, 6, 9));
	set_words(base, 6, 9, 1100);
	tell_address("grown", base);
	await();
	CHECK(words_are(base, 0, 9, 2100));

	/* Something is in the way. */
	CHECK(mmap(base + 9 * PAGE, PAGE, PROT_NONE, fixed, -1, 0) == base + 9 * PAGE);
	errno = 0;
	CHECK(mremap(base, 9 * PAGE, 12 * PAGE, 0) == MAP_FAILED && errno == ENOMEM);
	other = remap(base, 9, 12, MREMAP_MAYMOVE, NULL);
	CHECK(other != base && words_are(other, 0, 9, 2100) && is_zero(other, 9, 12));
	tell_address("was", base);
	tell_address("moved", other);
	await();
	CHECK(words_are(other, 0, 9, 3100));

	/* To a place of the program's choice, over what is there: pages 2 to 9 of 12. */
	CHECK(mmap(to, 10 * PAGE, RW, fixed, -1, 0) == to);
	set_words(to, 0, 10, 7000);
	CHECK(remap(other + 2 * PAGE, 7, 8, MREMAP_MAYMOVE | MREMAP_FIXED, to + PAGE) == to + PAGE);
	CHECK(words_are(to + PAGE, 0, 7, 3102) && *word(to, 8) == 0 && *word(to, 0) == 7000 && *word(to, 9) == 7009);
	CHECK(words_are(other, 0, 2, 3100) && is_zero(other, 9, 12));
	tell_address("rest", other);
	tell_address("fixed", to);
	await();

	/* The old mapping stays, without contents. */
	base = remap(to, 10, 10, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	CHECK(*word(base, 0) == 7000 && words_are(base + PAGE, 0, 7, 3102) && is_zero(to, 0, 10));
	set_words(to, 0, 10, 8000);
	tell_address("kept", to);
	tell_address("copy", base);
	await();
	CHECK(munmap(to, 10 * PAGE) == 0);

	/* Memory that cannot be written stays so, and moves. */
	CHECK(mprotect(base, 10 * PAGE, PROT_READ) == 0);
	base = remap(base, 10, 11, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	CHECK(base == to && *word(base, 0) == 7000 && *word(base, 9) == 7009);
	tell_address("protected", base);
	CHECK(mprotect(base, 11 * PAGE, PROT_NONE) == 0);
	base = remap(base, 11, 10, MREMAP_MAYMOVE, NULL);
	base = remap(base, 10, 10, MREMAP_MAYMOVE | MREMAP_FIXED, reserved(10));
	CHECK(mprotect(base, 10 * PAGE, RW) == 0 && *word(base, 0) == 7000 && *word(base, 9) == 7009);

	/* Beyond what the agent gives: plain memory, whole all the same. */
	plain = map_zeros(100);
	set_words(plain, 0, 100, 9000);
	plain = remap(plain, 100, 100000, MREMAP_MAYMOVE, NULL);
	CHECK(words_are(plain, 0, 100, 9000) && is_zero(plain, 100, 200));
	plain = remap(plain, 100000, 100, MREMAP_MAYMOVE, NULL);
	plain = remap(plain, 100, 50, MREMAP_MAYMOVE | MREMAP_FIXED, reserved(50));
	CHECK(words_are(plain, 0, 50, 9000));

	/* What the kernel refuses. */
	errno = 0;
	CHECK(mremap(other, PAGE, PAGE, MREMAP_FIXED, to) == MAP_FAILED && errno == EINVAL);
	errno = 0;
	CHECK(mremap(other, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, other + PAGE) == MAP_FAILED);
	CHECK(errno == EINVAL);
	errno = 0;
	CHECK(mremap(other, PAGE, 0, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	CHECK(mprotect(other, PAGE, PROT_READ) == 0);
	errno = 0;
	CHECK(mremap(other, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
	tell("end", 0);
	await();
	return 0;
}
