/* A thread that stays in the kernel for longer than it is waited for: its memory stays where it is, and it goes on. */
#define _GNU_SOURCE
#include "told.h"
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

static volatile int began;

static void *stays(void *unused)
{
	struct timespec time = {.tv_sec = 7};
	began = 1;
	pid_t child = vfork();
	if (child == 0) {
		syscall(SYS_nanosleep, &time, NULL);
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, NULL, 0) == child);
	return unused;
}

int main(void)
{
	pthread_t thread;
	uint64_t *block = malloc(100000), *later;
	block[0] = 7;
	CHECK(pthread_create(&thread, NULL, stays, NULL) == 0);
	while (!began)
		usleep(1000);
	usleep(100000);
	tell_address("before", block);
	later = malloc(2 << 20);
	later[0] = 8;
	tell_address("after", later);
	await();
	CHECK(pthread_join(thread, NULL) == 0 && block[0] == 7 && later[0] == 8);
	return 0;
}
