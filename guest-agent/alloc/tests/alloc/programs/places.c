/* Memory that is not malloc's alone: from before main, globals of the program and of a library, stacks of threads. */
#define _GNU_SOURCE
#include "told.h"
#include <pthread.h>

extern uint64_t library_data[1000];
extern uint64_t library_zeros[5000];
extern uint64_t *library_block(void);

static uint64_t data[1000] = {101};
static uint64_t zeros[30000];
static const uint64_t constant = 7;
/* Points into what is moved, and is moved. */
static uint64_t *pointer = &data[999];
static uint64_t *early;
static pthread_key_t key;

__attribute__((constructor)) static void before_main(void)
{
	early = malloc(3000);
	early[0] = 100;
	data[500] = 1;
}

static void *thread(void *name)
{
	uint64_t local[300] = {0};
	local[299] = 104;
	pthread_setspecific(key, local);
	tell_address(name, &local[299]);
	await();
	/* The test has changed it. */
	CHECK(((volatile uint64_t *)local)[299] == 1104);
	return local[0] ? NULL : name;
}

static void *leaves(void *way)
{
	uint64_t local[100];
	memset(local, 1, sizeof local);
	if (way)
		pthread_exit((void *)local[3]);
	for (;;)
		pause();
	return NULL;
}

static uint64_t depth(uint64_t n)
{
	volatile uint64_t page[512];
	page[0] = n;
	return n ? depth(n - 1) + page[0] : 0;
}

static void *deep(void *unused)
{
	/* 6 of the 8 MiB that are usual. */
	return (void *)depth(1500);
}

static void run(void *(*start)(void *), void *argument, pthread_attr_t *attr, void *expected)
{
	pthread_t id;
	void *result;
	CHECK(pthread_create(&id, attr, start, argument) == 0);
	if (start == leaves && !argument)
		CHECK(pthread_cancel(id) == 0);
	CHECK(pthread_join(id, &result) == 0);
	CHECK(result == expected);
}

static uint64_t destroyed;

static void destructor(void *local)
{
	destroyed++;
}

int main(void)
{
	static char own[256 << 10] __attribute__((aligned(4096)));
	pthread_attr_t attr;
	uint64_t main_local = 5;
	zeros[29999] = 102;
	tell_address("early", early);
	tell_address("data", data);
	tell_address("zeros", &zeros[29999]);
	tell_address("library_data", library_data);
	tell_address("library_zeros", &library_zeros[4999]);
	tell_address("library_block", library_block());
	tell_address("constant", &constant);
	CHECK(data[0] == 101 && data[500] == 1 && pointer == data + 999);
	tell_address("main_stack", &main_local);
	await();
	/* The test has changed it. */
	CHECK(*(volatile uint64_t *)data == 1101);

	CHECK(pthread_key_create(&key, destructor) == 0);
	run(thread, "local", NULL, "local");
	tell("ended", 1);
	await();
	CHECK(pthread_attr_init(&attr) == 0);
	CHECK(pthread_attr_setstacksize(&attr, 64 << 10) == 0);
	run(thread, "small", &attr, "small");
	CHECK(pthread_attr_setstack(&attr, own, sizeof own) == 0);
	run(thread, "own", &attr, "own");
	run(leaves, "x", NULL, (void *)0x0101010101010101);
	run(leaves, NULL, NULL, PTHREAD_CANCELED);
	run(deep, NULL, NULL, (void *)(1500ul * 1501 / 2));
	CHECK(destroyed == 3);
	for (int round = 0; round < 100; round++)
		run(deep, NULL, NULL, (void *)(1500ul * 1501 / 2));
	tell("end", 0);
	await();
	return 0;
}
