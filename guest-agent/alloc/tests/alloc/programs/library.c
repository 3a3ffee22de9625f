/* A library of the program: it has globals, and allocates when it is loaded. */
#include "told.h"

uint64_t library_data[1000] = {103};
uint64_t library_zeros[5000];
static uint64_t *block;

__attribute__((constructor)) static void at_load(void)
{
	block = malloc(2 << 20);
	block[0] = 105;
	library_zeros[4999] = 106;
}

uint64_t *library_block(void)
{
	return block;
}
