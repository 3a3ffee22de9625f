/* malloc and all its relatives. Each block's address is told; its first word holds a number. */
#define _GNU_SOURCE
#include "told.h"
#include <errno.h>
#include <malloc.h>

static uint64_t blocks;

static void *show(void *block, size_t size, size_t align)
{
	CHECK(block && (uintptr_t)block % align == 0);
	CHECK(malloc_usable_size(block) >= size);
	/* All of what it says can be used. */
	memset(block, 0x5a, malloc_usable_size(block));
	*(uint64_t *)block = ++blocks;
	tell_address("block", block);
	return block;
}

static int is(const unsigned char *bytes, size_t len, unsigned char value)
{
	for (size_t at = 0; at < len; at++)
		if (bytes[at] != value)
			return 0;
	return 1;
}

static void check_realloc(void)
{
	unsigned char *block = malloc(100);
	memset(block, 7, 100);
	/* Small to large, larger, smaller, small. */
	size_t sizes[] = {5000, 2 << 20, 9 << 20, 3 << 20, 50, 30 << 10};
	size_t kept = 100;
	for (int n = 0; n < 6; n++) {
		block = realloc(block, sizes[n]);
		kept = kept < sizes[n] ? kept : sizes[n];
		CHECK(is(block, kept, 7));
		CHECK(malloc_usable_size(block) >= sizes[n]);
		memset(block, 7, sizes[n]);
		kept = sizes[n];
	}
	show(block, 30 << 10, 16);
	CHECK(realloc(malloc(5), 0) == NULL);
	show(realloc(NULL, 9), 9, 16);
	show(reallocarray(NULL, 30, 30), 900, 16);
}

static void check_refusals(void)
{
	volatile size_t huge = SIZE_MAX;
	void *block;
	errno = 0;
	CHECK(malloc(huge) == NULL && errno == ENOMEM);
	errno = 0;
	CHECK(calloc(huge / 2, 3) == NULL && errno == ENOMEM);
	block = malloc(8);
	CHECK(realloc(block, huge) == NULL);
	CHECK(reallocarray(block, huge, huge) == NULL);
	free(block);
	CHECK(posix_memalign(&block, 24, 8) == EINVAL);
	CHECK(posix_memalign(&block, 4, 8) == EINVAL);
	CHECK(pvalloc(huge) == NULL);
	free(NULL);
	CHECK(malloc_usable_size(NULL) == 0);
	errno = 77;
	free(malloc(3 << 20));
	CHECK(errno == 77);
}

int main(void)
{
	void *block;
	show(malloc(100), 100, 16);
	show(malloc(3 << 20), 3 << 20, 16);
	CHECK(malloc(0) != malloc(0));
	for (size_t size = 8; size < 4 << 20; size *= 3) {
		/* What was used before is zeroed again. */
		block = malloc(size);
		memset(block, 1, size);
		free(block);
		block = calloc(size / 8, 8);
		CHECK(is(block, size / 8 * 8, 0));
		show(block, size, 16);
	}
	for (size_t align = 8; align <= 1 << 21; align *= 2) {
		CHECK(posix_memalign(&block, align, 40) == 0);
		show(block, 40, align);
		free(show(aligned_alloc(align, align), align, align));
		show(memalign(align, 2 << 20), 2 << 20, align);
	}
	show(valloc(10), 10, 4096);
	show(pvalloc(5000), 8192, 4096);
	show(strdup("made by the C library itself"), 29, 16);
	check_realloc();
	check_refusals();
	tell("end", 0);
	await();
	return 0;
}
