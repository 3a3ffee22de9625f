/* Libraries that come and go. Built with a directory in which names without a slash are found. */
#define _GNU_SOURCE
#include "pages.h"
#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>

static void *waits(void *go)
{
	char byte;
	CHECK(read(*(int *)go, &byte, 1) == 0);
	return NULL;
}

static uint64_t *tell_globals(void *library)
{
	uint64_t *data = dlsym(library, "library_data"), *zeros = dlsym(library, "library_zeros");
	CHECK(data && zeros && data[0] == 103 && zeros[4999] == 106);
	tell_address("data", data);
	tell_address("zeros", &zeros[4999]);
	return data;
}

int main(int argc, char **argv)
{
	void *library, *kept;
	uint64_t *data, *page;
	int pipes[2];
	pthread_t thread;
	CHECK(!dlopen("/nowhere/at/all.so", RTLD_NOW) && strstr(dlerror(), "/nowhere/at/all.so"));
	CHECK(dlopen(NULL, RTLD_NOW));
	library = dlopen(argv[1], RTLD_NOW);
	CHECK(library);
	data = tell_globals(library);
	await();
	/* The test has changed it. */
	CHECK(((volatile uint64_t *)data)[0] == 1103);
	pid_t child = fork();
	if (child == 0) {
		data[0] = 5;
		CHECK(dlclose(library) == 0 && !dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD));
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(data[0] == 1103);

	CHECK(dlclose(library) == 0 && !dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD));
	/* Something else where its globals were. */
	page = mmap((void *)((uintptr_t)data & -PAGE), PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(page == (void *)((uintptr_t)data & -PAGE) && is_zero(page, 0, 1));
	page[0] = 200;
	tell_address("page", page);
	await();

	/* By the program's own search path: its data are moved with the next library. */
	kept = dlopen("libplugin.so", RTLD_NOW);
	CHECK(kept);
	tell_globals(kept);
	await();
	library = dlopen(argv[1], RTLD_NOW);
	CHECK(library);
	tell_globals(kept);
	tell_globals(library);
	await();
	CHECK(dlclose(library) == 0);

	/* While there are threads. */
	CHECK(pipe(pipes) == 0 && pthread_create(&thread, NULL, waits, &pipes[0]) == 0);
	library = dlopen(argv[1], RTLD_NOW);
	CHECK(library);
	tell_globals(library);
	await();
	CHECK(close(pipes[1]) == 0 && pthread_join(thread, NULL) == 0);
	CHECK(dlclose(library) == 0 && dlclose(kept) == 0);
	return 0;
}
