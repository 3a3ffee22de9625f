/* Parent, child and grandchild, each with its own view of the same addresses; from main and from another thread. */
#define _GNU_SOURCE
#include "told.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>

static uint64_t data[100] = {1};
static uint64_t *block, *large, *local_pointer;

static void reap(pid_t child)
{
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Changes everything, in an order that the other process would see if memory were shared. */
static void set_all(uint64_t value)
{
	data[0] = block[0] = large[100000] = *local_pointer = value;
}

static int all_are(uint64_t value)
{
	return data[0] == value && block[0] == value && large[100000] == value && *local_pointer == value;
}

static void *family(void *unused)
{
	uint64_t local = 1;
	pid_t child, grandchild;
	local_pointer = &local;
	set_all(1);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		CHECK(all_are(1));
		set_all(2);
		grandchild = fork();
		if (grandchild == 0) {
			CHECK(all_are(2));
			set_all(3);
			tell("process", getpid());
			await();
			/* The test has changed one word of each process. */
			CHECK(((volatile uint64_t *)block)[1] == 1003 && all_are(3));
			_exit(0);
		}
		reap(grandchild);
		CHECK(all_are(2));
		tell("process", getpid());
		await();
		CHECK(((volatile uint64_t *)block)[1] == 1002 && all_are(2));
		free(block);
		free(large);
		exit(0);
	}
	CHECK(all_are(1));
	reap(child);
	CHECK(all_are(1));
	tell("process", getpid());
	await();
	CHECK(((volatile uint64_t *)block)[1] == 1001 && all_are(1));
	return NULL;
}

/* A stack of the program's own: a global, a mapping, or a large or small block. */
static void *own_stack(const char *kind, size_t len)
{
	static char global[256 << 10] __attribute__((aligned(4096)));
	if (!strcmp(kind, "global"))
		return global;
	if (!strcmp(kind, "mapping"))
		return mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return !strcmp(kind, "large") ? (char *)malloc(2 << 20) + (1 << 20) : malloc(len);
}

static pthread_mutex_t robust;

/* Both go by the C library's record of the thread: a mutex knows its owner, and who has died with one is found out. */
static void *by_thread(void *unused)
{
	static pthread_mutex_t mutex = PTHREAD_ERRORCHECK_MUTEX_INITIALIZER_NP;
	CHECK(pthread_mutex_lock(&mutex) == 0 && pthread_mutex_lock(&robust) == 0);
	family(NULL);
	CHECK(pthread_mutex_unlock(&mutex) == 0);
	return NULL;
}

static ucontext_t here, there;

static void by_context(void)
{
	family(NULL);
}

int main(int argc, char **argv)
{
	size_t len = 256 << 10;
	pthread_attr_t attr;
	pthread_t thread;
	FILE *pipe;
	char text[20] = "";
	block = malloc(1000);
	large = malloc(2 << 20);
	/* A child that executes another program at once. */
	pipe = popen("echo from a shell", "r");
	CHECK(pipe && fread(text, 1, 12, pipe) == 12 && !strcmp(text, "from a shell"));
	CHECK(pclose(pipe) == 0 && system("true") == 0);
	tell_address("data", data);
	tell_address("block", block);
	tell_address("large", &large[100000]);
	pthread_mutexattr_t mutex;
	CHECK(pthread_mutexattr_init(&mutex) == 0);
	CHECK(pthread_mutexattr_setrobust(&mutex, PTHREAD_MUTEX_ROBUST) == 0);
	CHECK(pthread_mutex_init(&robust, &mutex) == 0);
	CHECK(pthread_attr_init(&attr) == 0);
	if (argc > 2 && !strcmp(argv[1], "context")) {
		CHECK(getcontext(&there) == 0);
		there.uc_stack.ss_sp = own_stack(argv[2], len);
		there.uc_stack.ss_size = len;
		there.uc_link = &here;
		makecontext(&there, by_context, 0);
		CHECK(swapcontext(&here, &there) == 0);
	} else if (argc > 1) {
		if (argc > 2)
			CHECK(pthread_attr_setstack(&attr, own_stack(argv[2], len), len) == 0);
		CHECK(pthread_create(&thread, &attr, by_thread, NULL) == 0);
		CHECK(pthread_join(thread, NULL) == 0);
		CHECK(pthread_mutex_trylock(&robust) == EOWNERDEAD);
	} else {
		family(NULL);
	}
	tell("end", 0);
	return 0;
}
