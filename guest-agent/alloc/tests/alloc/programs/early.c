/* A library that opens a stream as it is loaded, and does not depend on any other. */
#include <stdio.h>

FILE *early;

__attribute__((constructor)) static void open_early(void)
{
	early = fopen("/dev/null", "w");
}
