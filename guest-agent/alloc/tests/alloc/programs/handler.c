/* The handler of a signal that comes while its thread is inside realloc. The argument says what it does. */
#define _GNU_SOURCE
#include "pages.h"
#include <signal.h>
#include <sys/syscall.h>

#define LEN ((size_t)2 << 20)

static char *block;
static int handled;

static void on_fault(int signal)
{
	if (handled++)
		_exit(5);
	if (getenv("HANDLER_FORKS")) {
		errno = 0;
		CHECK(fork() == -1 && errno == ENOMEM);
	} else {
		/* The compiler must not leave it out. */
		void *volatile other = malloc(10);
		CHECK(other);
	}
	/* The library waits for itself, but not for calls by number. */
	CHECK(syscall(SYS_mprotect, block, LEN, RW) == 0);
}

int main(void)
{
	char *moved;
	block = malloc(LEN);
	CHECK(block && signal(SIGSEGV, on_fault) != SIG_ERR);
	memset(block, 7, LEN);
	alarm(600);
	CHECK(mprotect(block, LEN, PROT_NONE) == 0);
	moved = realloc(block, 2 * LEN);
	CHECK(moved && handled == 1 && moved[LEN - 1] == 7);
	tell("through", 0);
	await();
	return 0;
}
