/* Many libraries with variables of each thread come and go: the loader allocates and frees for them where one is looked
 * at for the first time, which may be anywhere. */
#define _GNU_SOURCE
#include "told.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

enum { ROUNDS = 3 };

static uint64_t (*_Atomic newest)(void);
static atomic_int enough;
static pthread_mutex_t keep = PTHREAD_MUTEX_INITIALIZER;

static void *allocates(void *unused)
{
	while (!enough) {
		char *block = malloc(100 + (uintptr_t)&newest % 7);
		FILE *file = fopen("/dev/null", "r");
		CHECK(block && file);
		memset(block, 1, 100);
		/* Kept from going while it is called. */
		CHECK(pthread_mutex_lock(&keep) == 0);
		if (newest)
			CHECK(newest() >= 7);
		CHECK(pthread_mutex_unlock(&keep) == 0);
		CHECK(fclose(file) == 0);
		free(block);
	}
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t threads[2];
	void *libraries[200];
	CHECK(argc - 1 <= 200);
	for (int i = 0; i < 2; i++)
		CHECK(pthread_create(&threads[i], NULL, allocates, NULL) == 0);
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 1; i < argc; i++) {
			libraries[i - 1] = dlopen(argv[i], RTLD_NOW);
			CHECK(libraries[i - 1]);
			newest = (uint64_t(*)(void))dlsym(libraries[i - 1], "next");
			CHECK(newest && newest() == 7 && newest() == 8);
			if (i % 32)
				continue;
			pid_t child = fork();
			int status;
			if (child == 0)
				_exit(newest() == 9 ? 0 : 1);
			CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
		}
		CHECK(pthread_mutex_lock(&keep) == 0);
		newest = NULL;
		for (int i = 1; i < argc; i++)
			CHECK(dlclose(libraries[i - 1]) == 0);
		CHECK(pthread_mutex_unlock(&keep) == 0);
	}
	enough = 1;
	for (int i = 0; i < 2; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	tell("end", 0);
	await();
	return 0;
}
