/* How a program under test talks with the test: in lines, without allocating. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                  \
	do {                                                                              \
		if (!(condition)) {                                                       \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
			_exit(3);                                                         \
		}                                                                         \
	} while (0)

/* With TOLD_ASKS, a process asks for a device before it tells its first line. */
static inline void ask(void)
{
	static int asked;
	char session[256];
	int (*of_process)(void *) = (int (*)(void *))dlsym(RTLD_DEFAULT, "svm_alloc_session");
	if (asked != getpid() && getenv("TOLD_ASKS") && of_process)
		of_process(session);
	asked = getpid();
}

static inline void tell(const char *name, uint64_t value)
{
	char line[80];
	ask();
	int len = snprintf(line, sizeof line, "%s %llu\n", name, (unsigned long long)value);
	CHECK(write(1, line, len) == len);
}

static inline void tell_address(const char *name, const volatile void *address)
{
	tell(name, (uintptr_t)address);
}

/* A program whose test has gone away ends. */
static inline void await(void)
{
	char byte;
	if (read(0, &byte, 1) != 1)
		_exit(4);
}
