/* Parts of mappings go, and others take their place. */
#define _GNU_SOURCE
#include "pages.h"

static void *map_at(void *at, size_t pages, int flags)
{
	void *base = mmap(at, pages * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
	CHECK(base == at);
	return base;
}

int main(void)
{
	char *base = map_zeros(20);
	set_words(base, 0, 20, 100);
	tell_address("base", base);
	await();

	/* In the middle, at both ends, and across two parts and the hole between. */
	CHECK(munmap(base + 5 * PAGE, 3 * PAGE) == 0);
	CHECK(munmap(base, PAGE) == 0);
	CHECK(munmap(base + 19 * PAGE, PAGE) == 0);
	CHECK(munmap(base + 4 * PAGE, 5 * PAGE) == 0);
	CHECK(words_are(base, 1, 4, 100) && words_are(base, 9, 19, 100));
	tell("cut", 0);
	await();
	CHECK(words_are(base, 1, 4, 1100) && words_are(base, 9, 19, 1100));

	/* New ones: in the hole, and over what is there. */
	map_at(base + 5 * PAGE, 2, MAP_FIXED_NOREPLACE);
	map_at(base + 10 * PAGE, 4, MAP_FIXED);
	map_at(base + 12 * PAGE, 1, MAP_FIXED);
	CHECK(is_zero(base, 5, 7) && is_zero(base, 10, 14));
	set_words(base, 5, 7, 200);
	set_words(base, 10, 14, 300);
	/* Memory that no GPU is to reach, over some that it did. */
	CHECK(mmap(base + 16 * PAGE, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
	      == base + 16 * PAGE);
	tell("mapped", 0);
	await();
	CHECK(words_are(base, 5, 7, 1200) && words_are(base, 10, 14, 1300));
	CHECK(words_are(base, 1, 4, 1100) && words_are(base, 9, 10, 1100) && words_are(base, 14, 16, 1100));

	/* A call that fails changes nothing. */
	errno = 0;
	CHECK(mmap(base + 14 * PAGE, PAGE, RW, MAP_PRIVATE | MAP_FIXED, 12345, 0) == MAP_FAILED && errno == EBADF);
	CHECK(words_are(base, 14, 16, 1100));
	CHECK(munmap(base, 20 * PAGE) == 0);
	tell("gone", 0);
	await();
	return 0;
}
