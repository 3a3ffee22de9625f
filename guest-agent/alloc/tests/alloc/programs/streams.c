/* Threads write to a stream while main forks; or open and flush streams, if there is an argument. */
#define _GNU_SOURCE
#include "told.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

static FILE *stream;
static atomic_int stop;
static atomic_ulong lines;

static void *writer(void *unused)
{
	while (!stop) {
		CHECK(fprintf(stream, "line %lu\n", (unsigned long)lines) > 0);
		lines++;
	}
	return NULL;
}

/* Allocates while it is inside the stream. */
static void *opener(void *unused)
{
	while (!stop) {
		FILE *other = fopen("/dev/null", "w");
		CHECK(other && fputc('a', other) == 'a' && fclose(other) == 0);
		lines++;
	}
	return NULL;
}

/* Waits inside the list of all streams for each stream. */
static void *flusher(void *unused)
{
	while (!stop)
		CHECK(fflush(NULL) == 0);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[4];
	stream = fopen("/dev/null", "w");
	CHECK(stream);
	alarm(600);
	for (int n = 0; n < 4; n++)
		CHECK(pthread_create(&threads[n], NULL, argc == 1 ? writer : n ? opener : flusher, NULL) == 0);
	for (int n = 0; n < 300; n++) {
		pid_t pid = fork();
		if (pid == 0)
			_exit(0);
		CHECK(waitpid(pid, NULL, 0) == pid);
		unsigned long before = lines;
		for (int wait = 0; lines == before; wait++) {
			CHECK(wait < 20000);
			usleep(1000);
		}
	}
	stop = 1;
	for (int n = 0; n < 4; n++)
		CHECK(pthread_join(threads[n], NULL) == 0);
	tell("end", 0);
	return 0;
}
