/* A slab with so many guard pages that there is no room to keep account of more. */
#define _GNU_SOURCE
#include "pages.h"
#include <sys/wait.h>

#define GUARDS 1850
#define BLOCKS 20000

static unsigned char *blocks[BLOCKS];

int main(void)
{
	char *slab = map_zeros(2 * GUARDS + 1), *large;
	int status;
	for (int n = 0; n < GUARDS; n++)
		CHECK(mprotect(slab + (2 * n + 1) * PAGE, PAGE, PROT_NONE) == 0);
	for (int n = 0; n < BLOCKS; n++) {
		blocks[n] = malloc(1000);
		CHECK(blocks[n]);
		memset(blocks[n], n % 251, 1000);
	}
	large = malloc(3 << 20);
	CHECK(large);
	memset(large, 9, 3 << 20);
	pid_t child = fork();
	if (child == 0) {
		for (int n = 0; n < BLOCKS; n++) {
			CHECK(blocks[n][0] == n % 251 && blocks[n][999] == n % 251);
			memset(blocks[n], 255, 1000);
		}
		CHECK(large[2 << 20] == 9);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	for (int n = 0; n < BLOCKS; n++) {
		CHECK(blocks[n][0] == n % 251 && blocks[n][999] == n % 251);
		free(blocks[n]);
	}
	free(large);
	tell("through", 0);
	await();
	return 0;
}
