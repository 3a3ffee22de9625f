/* A library with a variable of each thread. */
#include <stdint.h>

static __thread uint64_t variable[100] = {7};

uint64_t next(void)
{
	return variable[0]++;
}
