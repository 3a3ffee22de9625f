/* Executes itself so that it has more rights than whoever started it. */
#define _GNU_SOURCE
#include "told.h"
#include <sys/auxv.h>

int main(int argc, char **argv)
{
	char *again[] = {argv[0], "again", NULL};
	if (argc == 1) {
		CHECK(setresuid(1, 0, 0) == 0);
		execv("/proc/self/exe", again);
	}
	CHECK(argc == 2 && getauxval(AT_SECURE) && getenv("SVM_AGENT_SOCKET"));
	CHECK(malloc(2 << 20));
	tell("executed", 0);
	await();
	return 0;
}
