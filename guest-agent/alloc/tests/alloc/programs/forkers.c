/* Threads that fork at the same time, and children that go on for long: none keeps its parent from allocating. */
#include "told.h"
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

enum { THREADS = 4, ROUNDS = 40 };

static pthread_barrier_t barrier;

static void *forks(void *unused)
{
	pid_t children[ROUNDS];
	int status;
	for (int round = 0; round < ROUNDS; round++) {
		pthread_barrier_wait(&barrier);
		children[round] = fork();
		CHECK(children[round] >= 0);
		if (children[round] == 0)
			for (;;)
				pause();
		free(malloc(100));
	}
	/* All have forked. */
	pthread_barrier_wait(&barrier);
	for (int round = 0; round < ROUNDS; round++) {
		CHECK(kill(children[round], SIGKILL) == 0);
		CHECK(waitpid(children[round], &status, 0) == children[round]);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	}
	return unused;
}

int main(void)
{
	pthread_t threads[THREADS];
	CHECK(pthread_barrier_init(&barrier, NULL, THREADS) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, forks, NULL) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	tell("end", 0);
	await();
	return 0;
}
