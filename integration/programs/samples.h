/* Times of a program, written as JSON: it tells each one, and whoever reads them does the arithmetic. */
#ifndef SAMPLES_H
#define SAMPLES_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Nanoseconds, the same clock in all processes. */
static inline uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* One member of an object, and what stands behind it. */
static inline void tell(const char *name, const uint64_t *times, size_t count, const char *after)
{
	printf("\"%s\": [", name);
	for (size_t i = 0; i < count; i++)
		printf("%s%llu", i == 0 ? "" : ", ", (unsigned long long)times[i]);
	printf("]%s", after);
}

static inline _Noreturn void fail(const char *what)
{
	perror(what);
	exit(1);
}

#endif
