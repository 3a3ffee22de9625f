/* A shared library with memory of its own. */
#include "kinds.h"

#include <stdlib.h>

static uint64_t value[BYTES / 8] = { 1 };
static uint64_t zero[BYTES / 8];
static struct library memory = { value, zero, NULL };

__attribute__((constructor)) static void allocate(void)
{
	memory.block = malloc(BYTES);
}

const struct library *library_memory(void)
{
	return &memory;
}
