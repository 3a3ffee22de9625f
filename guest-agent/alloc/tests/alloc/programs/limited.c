/* A user who may lock few bytes: one page of the break, and more than that. */
#include "told.h"

static char *next_page(char *at)
{
	return (char *)(((uintptr_t)at + 4095) & ~(uintptr_t)4095);
}

int main(void)
{
	char *few = next_page(sbrk(8192)), *many = next_page(sbrk(1 << 20));

	*few = *many = 1;
	tell_address("few", few);
	tell_address("many", many);
	await();
	return 0;
}
