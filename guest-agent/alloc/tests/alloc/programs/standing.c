/* Threads of all kinds while the program asks for a device: none of them notices, and GPUs reach the stack of each. */
#define _GNU_SOURCE
#include "pages.h"
#include <errno.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

enum kind { COUNTS, ALLOCATES, READS, POLLS, LOCKS, WAITS, TIMED, DEEP, BLOCKS, SIGWAITS, ALTERNATE, MAKES, FORKS, KINDS };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static int is_open;
static atomic_int asked, ready, through, seen;
static volatile uint64_t *locals[KINDS];
static uint64_t global[64];
static int pipes[2], doors[2];
static sem_t semaphore;
static uint64_t *block;

/* One word in each kind of memory, which only this thread writes to. */
static uint64_t count_on(volatile uint64_t *local, int kind)
{
	uint64_t rounds = 0;
	while (!asked) {
		++*local;
		++*(volatile uint64_t *)&global[kind];
		++*(volatile uint64_t *)&block[kind];
		rounds++;
		CHECK(*local == rounds && global[kind] == rounds && block[kind] == rounds);
	}
	return rounds;
}

static atomic_int handled;

static void on_alternate(int signal)
{
	handled++;
	while (!asked)
		;
}

static void wait_open(void)
{
	CHECK(pthread_mutex_lock(&gate) == 0);
	while (!is_open)
		CHECK(pthread_cond_wait(&opened, &gate) == 0);
	CHECK(pthread_mutex_unlock(&gate) == 0);
}

static void deep(int more)
{
	volatile char frame[4096];
	frame[0] = frame[4095] = more;
	if (more)
		deep(more - 1);
	else
		wait_open();
	CHECK(frame[0] == (char)more && frame[4095] == (char)more);
}

static int ignore(struct dl_phdr_info *info, size_t size, void *unused)
{
	return 0;
}

static void *ends(void *unused)
{
	return unused;
}

static void make_bound(void)
{
	pthread_t thread;
	pthread_attr_t attr;
	cpu_set_t all;
	CHECK(sched_getaffinity(0, sizeof all, &all) == 0 && pthread_attr_init(&attr) == 0);
	CHECK(pthread_attr_setaffinity_np(&attr, sizeof all, &all) == 0);
	CHECK(pthread_create(&thread, &attr, ends, NULL) == 0 && pthread_join(thread, NULL) == 0);
	pthread_attr_destroy(&attr);
}

static void *work(void *argument)
{
	enum kind kind = (uintptr_t)argument;
	volatile uint64_t local = 0;
	char bytes[2];
	sigset_t all;
	struct timespec time;
	struct pollfd polled = {.fd = doors[0], .events = POLLIN};
	stack_t alternate = {.ss_size = 1 << 16};
	locals[kind] = &local;
	ready++;
	switch (kind) {
	case COUNTS:
	case BLOCKS:
		sigfillset(&all);
		if (kind == BLOCKS)
			CHECK(pthread_sigmask(SIG_BLOCK, &all, NULL) == 0);
		local = count_on(&local, kind) ? 0 : 1;
		break;
	case ALLOCATES:
		while (!asked) {
			char *here = malloc(100 + ready), *large = malloc(2 << 20);
			here[99] = large[1 << 20] = 7;
			CHECK(here[99] == 7 && large[1 << 20] == 7);
			free(here);
			free(large);
		}
		break;
	case READS:
		/* Begins anew by itself. */
		CHECK(read(pipes[0], bytes, 1) == 1 && bytes[0] == 'x');
		break;
	case POLLS:
		/* Ended by any handler. */
		while (poll(&polled, 1, -1) == -1)
			CHECK(errno == EINTR);
		break;
	case LOCKS:
		CHECK(pthread_mutex_lock(&mutex) == 0);
		CHECK(pthread_mutex_unlock(&mutex) == 0);
		break;
	case WAITS:
		wait_open();
		break;
	case TIMED:
		clock_gettime(CLOCK_REALTIME, &time);
		time.tv_sec += 600;
		CHECK(sem_timedwait(&semaphore, &time) == 0 || (errno == EINTR && sem_wait(&semaphore) == 0));
		break;
	case DEEP:
		/* Deeper than what is moved of a stack. */
		deep(100);
		break;
	case SIGWAITS:
		sigfillset(&all);
		CHECK(pthread_sigmask(SIG_BLOCK, &all, NULL) == 0);
		int got = sigwaitinfo(&all, NULL);
		CHECK(got == SIGUSR1 || (got == -1 && errno == EINTR && sigwaitinfo(&all, NULL) == SIGUSR1));
		break;
	case ALTERNATE:
		/* Stopped inside another handler, on a stack that is a block. */
		alternate.ss_sp = malloc(alternate.ss_size);
		CHECK(sigaltstack(&alternate, NULL) == 0);
		CHECK(pthread_kill(pthread_self(), SIGUSR2) == 0 && handled == 1);
		break;
	case MAKES:
		/* The C library holds a lock that the new thread waits for, with all signals held back. */
		while (!asked)
			make_bound();
		break;
	case FORKS:
		while (!asked) {
			pid_t child = fork();
			if (child == 0) {
				/* The loader's lock is free there, whoever has it here. */
				dl_iterate_phdr(ignore, NULL);
				_exit(0);
			}
			CHECK(child > 0 && waitpid(child, NULL, 0) == child);
		}
		break;
	default:
		CHECK(0);
	}
	through++;
	/* A GPU writes to it. */
	while (local != 1000 + kind)
		usleep(1000);
	seen++;
	return NULL;
}

static void *locks_and_ends(void *unused)
{
	CHECK(pthread_mutex_lock(&mutex) == 0 && pthread_mutex_unlock(&mutex) == 0);
	return unused;
}

int main(void)
{
	pthread_t threads[KINDS];
	struct sigaction action = {.sa_handler = on_alternate, .sa_flags = SA_ONSTACK};
	block = calloc(KINDS, sizeof *block);
	CHECK(pipe(pipes) == 0 && pipe(doors) == 0 && sem_init(&semaphore, 0, 0) == 0 && sigaction(SIGUSR2, &action, NULL) == 0);
	CHECK(pthread_mutex_lock(&mutex) == 0);
	for (uintptr_t kind = 0; kind < KINDS; kind++)
		CHECK(pthread_create(&threads[kind], NULL, work, (void *)kind) == 0);
	while (ready < KINDS || !handled)
		usleep(1000);
	usleep(20000);
	ask();
	asked = 1;
	CHECK(write(pipes[1], "x", 1) == 1 && write(doors[1], "x", 1) == 1 && sem_post(&semaphore) == 0);
	CHECK(pthread_mutex_unlock(&mutex) == 0);
	CHECK(pthread_mutex_lock(&gate) == 0);
	is_open = 1;
	CHECK(pthread_cond_broadcast(&opened) == 0 && pthread_mutex_unlock(&gate) == 0);
	CHECK(pthread_kill(threads[SIGWAITS], SIGUSR1) == 0);
	while (through < KINDS)
		usleep(1000);
	for (int kind = 0; kind < KINDS; kind++)
		tell_address("local", locals[kind]);
	tell_address("global", global);
	tell_address("block", block);
	await();
	for (int kind = 0; kind < KINDS; kind++)
		CHECK(pthread_join(threads[kind], NULL) == 0);
	CHECK(seen == KINDS);
	/* The C library still has its signal for itself: it changes the user of all threads by it. */
	CHECK(pthread_mutex_lock(&mutex) == 0);
	CHECK(pthread_create(&threads[0], NULL, locks_and_ends, NULL) == 0);
	CHECK(setgid(getgid()) == 0);
	CHECK(pthread_mutex_unlock(&mutex) == 0 && pthread_join(threads[0], NULL) == 0);
	return 0;
}
