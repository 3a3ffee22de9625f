/* Changes its user, as servers do. */
#define _GNU_SOURCE
#include "told.h"

int main(void)
{
	char *first = malloc(2 << 20), *second;
	CHECK(first);
	memset(first, 1, 2 << 20);
	tell("begun", 0);
	await();
	CHECK(setresuid(1, 1, 1) == 0);
	second = malloc(2 << 20);
	CHECK(second);
	memset(second, 2, 2 << 20);
	CHECK(first[1 << 20] == 1);
	free(first);
	free(second);
	tell("through", 0);
	await();
	return 0;
}
