/* mprotect: what is protected leaves GPUs, and nothing else changes. */
#define _GNU_SOURCE
#include "touch.h"
#include <malloc.h>

static uint64_t data[3 * WORDS] __attribute__((aligned(4096))) = {1};

static int can_read(void *base, size_t page)
{
	if (sigsetjmp(back, 1))
		return 0;
	return *word(base, page) != 12345;
}

/* Protects the second of three pages. */
static void protect(void *base, int prot)
{
	CHECK(mprotect((char *)base + PAGE, PAGE, prot) == 0);
	CHECK(can_write(base, 0) && can_write(base, 2));
	CHECK(can_write(base, 1) == !!(prot & PROT_WRITE) && can_read(base, 1) == !!(prot & PROT_READ));
}

static void try_all(const char *name, void *base)
{
	set_words(base, 0, 3, 100);
	protect(base, PROT_READ | PROT_WRITE);
	protect(base, PROT_READ);
	CHECK(words_are(base, 0, 3, 100));
	protect(base, PROT_NONE);
	protect(base, PROT_READ | PROT_WRITE);
	CHECK(words_are(base, 0, 3, 100));
	protect(base, PROT_READ | PROT_WRITE | PROT_EXEC);
	protect(base, PROT_READ | PROT_WRITE);
	CHECK(words_are(base, 0, 3, 100));
	tell_address(name, base);
}

int main(void)
{
	char *mapping = map_zeros(3), *large = memalign(PAGE, 2 << 20), *small = memalign(PAGE, 3 * PAGE);
	signal(SIGSEGV, on_fault);
	try_all("reached", mapping);
	try_all("reached", large);
	try_all("reached", small);
	try_all("reached", data);
	await();
	for (int n = 0; n < 3; n += 2) {
		CHECK(*word(mapping, n) == 1100 + n && *word(large, n) == 1100 + n);
		CHECK(*word(small, n) == 1100 + n && *word(data, n) == 1100 + n);
	}
	CHECK(malloc_usable_size(large) >= 2 << 20);
	memset(large, 1, 2 << 20);
	free(large);
	free(small);
	/* Protected memory is unmapped, and other memory takes its place. */
	CHECK(mprotect(mapping, PAGE, PROT_NONE) == 0 && munmap(mapping, 3 * PAGE) == 0);
	CHECK(mmap(mapping, 3 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == mapping);
	CHECK(is_zero(mapping, 0, 3));
	set_words(mapping, 0, 3, 200);
	tell_address("anew", mapping);
	await();
	return 0;
}
