/* Pages that a program maps by itself. */
#include "told.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define WORDS (PAGE / 8)
#define RW (PROT_READ | PROT_WRITE)

/* The first word of the page n from `base` on. */
static inline volatile uint64_t *word(void *base, size_t n)
{
	return (uint64_t *)base + n * WORDS;
}

static inline void *map_zeros(size_t pages)
{
	void *base = mmap(NULL, pages * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(base != MAP_FAILED);
	return base;
}

static inline void set_words(void *base, size_t from, size_t to, uint64_t value)
{
	for (size_t n = from; n < to; n++)
		*word(base, n) = value + n;
}

static inline int words_are(void *base, size_t from, size_t to, uint64_t value)
{
	for (size_t n = from; n < to; n++)
		if (*word(base, n) != value + n)
			return 0;
	return 1;
}

static inline int is_zero(void *base, size_t from, size_t to)
{
	uint64_t *words = base;
	for (size_t at = from * WORDS; at < to * WORDS; at++)
		if (words[at])
			return 0;
	return 1;
}
