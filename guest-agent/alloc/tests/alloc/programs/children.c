/* Children that run no handlers: they have their parent's arenas, and no agent. */
#define _GNU_SOURCE
#include "pages.h"
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static void reap(pid_t child)
{
	int status;
	CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
	char *blocks[3], *mapping = map_zeros(4);
	uint64_t *kept = malloc(2 << 20);
	pid_t child;
	for (int n = 0; n < 3; n++)
		blocks[n] = malloc(2 << 20);
	CHECK(kept && blocks[0] && blocks[1] && blocks[2]);
	*kept = 77;
	child = _Fork();
	if (child == 0) {
		char *block = malloc(3 << 20);
		free(blocks[0]);
		CHECK(block && munmap(mapping, PAGE) == 0);
		memset(block, 1, 3 << 20);
		_exit(0);
	}
	reap(child);
	child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (child == 0) {
		free(blocks[1]);
		_exit(0);
	}
	reap(child);
	/* It has its parent's memory, and no other block may come to where this one was. */
	child = vfork();
	if (child == 0) {
		free(blocks[2]);
		_exit(0);
	}
	reap(child);
	*word(mapping, 0) = 78;
	tell_address("kept", kept);
	tell_address("mapping", mapping);
	uint64_t *later = malloc(2 << 20);
	CHECK(later);
	*later = 79;
	tell_address("later", later);
	await();
	free(blocks[0]);
	free(blocks[1]);
	return 0;
}
