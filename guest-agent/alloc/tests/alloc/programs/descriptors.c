/* Comes to its limit of open files. */
#define _GNU_SOURCE
#include "told.h"
#include <errno.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define LEN (2 << 20)

static char *filled(void)
{
	char *block = malloc(LEN);
	CHECK(block);
	memset(block, 7, LEN);
	return block;
}

int main(void)
{
	struct rlimit limit, few;
	int status;
	tell_address("first", filled());
	await();
	CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
	few = limit;
	few.rlim_cur = 3;
	CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
	tell_address("second", filled());
	errno = 0;
	CHECK(fork() == -1 && errno == ENOMEM);
	CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	tell_address("third", filled());
	pid_t child = fork();
	if (child == 0)
		_exit(0);
	CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	await();
	return 0;
}
