/* Every way to hold the library wrong, and every error that a program can bring about. Prints "through" if all are told. */
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

/* The error must be this one, with a text that holds these words. */
static void refused(int line, int told, int error, const char *words)
{
	if (told != -error || strstr(svm_error(), words) == NULL) {
		fprintf(stderr, "line %d: %d (%s), not %d with \"%s\"\n", line, told, svm_error(), -error, words);
		exit(1);
	}
}
#define REFUSED(call, error, words) refused(__LINE__, call, error, words)

static struct svm *svm;
static struct svm_mirror *mirror;
static struct svm_packet nop = {SVM_OP_NOP, 0, 0, 0, 0, 0, 0, {0, 0}};

static void null_arguments(void)
{
	struct svm *other;
	struct svm_mirror *made;
	struct svm_device device;
	struct svm_job *job;
	struct svm_failure failure;
	uint64_t at;
	void *memory;

	REFUSED(svm_open(NULL), EINVAL, "out");
	REFUSED(svm_connect("/nowhere", NULL), EINVAL, "out");
	REFUSED(svm_devices(NULL, &device, 1), EINVAL, "svm");
	REFUSED(svm_devices(svm, NULL, 1), EINVAL, "out");
	REFUSED(svm_map(NULL, NULL, 4096, &memory), EINVAL, "svm");
	REFUSED(svm_map(svm, NULL, 4096, NULL), EINVAL, "out");
	REFUSED(svm_map(svm, NULL, 0, &memory), EINVAL, "length");
	REFUSED(svm_map(svm, NULL, SIZE_MAX, &memory), EINVAL, "length");
	REFUSED(svm_map(svm, (void *)17, 4096, &memory), EINVAL, "4096");
	REFUSED(svm_unmap(NULL, &device), EINVAL, "svm");
	REFUSED(svm_unmap(svm, NULL), EINVAL, "address");
	REFUSED(svm_mirror(NULL, 0, &made), EINVAL, "svm");
	REFUSED(svm_mirror(svm, 0, NULL), EINVAL, "out");
	REFUSED(svm_mirror_all(NULL, &made, 1), EINVAL, "svm");
	REFUSED(svm_mirror_all(svm, NULL, 1), EINVAL, "out");
	REFUSED(svm_mirror_device(NULL, &device), EINVAL, "mirror");
	REFUSED(svm_mirror_device(mirror, NULL), EINVAL, "out");
	REFUSED(svm_device_address(NULL, &device, &at), EINVAL, "mirror");
	REFUSED(svm_device_address(mirror, NULL, &at), EINVAL, "pointer");
	REFUSED(svm_device_address(mirror, &device, NULL), EINVAL, "out");
	REFUSED(svm_run(NULL, 0, &nop, 1), EINVAL, "mirror");
	REFUSED(svm_run(mirror, 0, NULL, 1), EINVAL, "packets");
	REFUSED(svm_run(mirror, 0, &nop, 0), EINVAL, "count");
	REFUSED(svm_run(mirror, 0, &nop, SIZE_MAX), EINVAL, "count");
	REFUSED(svm_run(mirror, SVM_MAX_RINGS, &nop, 1), EINVAL, "ring");
	REFUSED(svm_submit(NULL, 0, &nop, 1, &job), EINVAL, "mirror");
	REFUSED(svm_submit(mirror, 0, NULL, 1, &job), EINVAL, "packets");
	REFUSED(svm_submit(mirror, 0, &nop, 1, NULL), EINVAL, "out");
	REFUSED(svm_job_poll(NULL), EINVAL, "job");
	REFUSED(svm_job_wait(NULL, 1), EINVAL, "job");
	REFUSED(svm_job_failure(NULL, &failure), EINVAL, "job");
	REFUSED(svm_fd(NULL), EINVAL, "svm");
	svm_close(NULL);
	svm_unmirror(NULL);
	svm_job_free(NULL);
	REFUSED(svm_connect("/nowhere/at/all", &other), ENOENT, "start `svm-agent serve`");
}

static void refusals(void)
{
	struct svm_mirror *made[2] = {NULL, NULL};
	struct svm *other = NULL;
	struct svm_device devices[2];

	REFUSED(svm_open(&other), EBUSY, "HELLO");
	REFUSED(svm_open(&other), EBUSY, "use that one's handle");
	REFUSED(svm_mirror(svm, 99, made), ENOENT, "no device 99");
	REFUSED(svm_mirror(svm, 0, made), EEXIST, "VM_CREATE");
	REFUSED(svm_mirror(svm, 0, made), EEXIST, "use that one");
	REFUSED(svm_mirror(svm, 2, made), EOPNOTSUPP, "no page faults");
	REFUSED(svm_mirror(svm, 3, made), ERANGE, "22 address bits");
	CHECK(made[0] == NULL && other == NULL);
	/* More devices than room: those are described, and the number is told. */
	memset(devices, 0x55, sizeof devices);
	CHECK(svm_devices(svm, devices, 1) == 4 && devices[0].dev_id == 0 && devices[1].dev_id == 0x55555555);
	CHECK(svm_devices(svm, NULL, 0) == 4);
	CHECK(strcmp(devices[0].name, "mock") == 0 && devices[0].va_bits == 48);
}

static void memory(void)
{
	struct svm *other;
	void *at = NULL, *again = NULL;
	int fork_status;

	/* A context of its own. */
	CHECK(svm_connect(NULL, &other) == 0);
	CHECK(svm_map(other, NULL, 5000, &at) == 0 && at != NULL);
	memset(at, 1, 8192);
	REFUSED(svm_map(other, at, 4096, &again), EEXIST, "choose another address");
	CHECK(again == NULL);
	REFUSED(svm_unmap(other, (char *)at + 4096), ENOENT, "no memory");
	REFUSED(svm_unmap(svm, at), ENOENT, "no memory");
	if (fork() == 0) {
		struct svm_device device;
		REFUSED(svm_devices(other, &device, 1), ECHILD, "fork");
		svm_close(other);
		_exit(0);
	}
	CHECK(wait(&fork_status) > 0 && fork_status == 0);
	CHECK(svm_unmap(other, at) == 0);
	CHECK(svm_map(other, at, 4096, &again) == 0 && again == at && *(char *)at == 0);
	svm_close(other);
}

static void jobs(void)
{
	struct svm_packet bad[2];
	struct svm_failure failure;
	struct svm_job *job;
	uint64_t *words = calloc(2, sizeof *words);
	uint64_t at;

	CHECK(svm_device_address(mirror, words, &at) == 0 && at == (uintptr_t)words);
	/* Nothing is at 4096, and the program knows before the device does that it is none of ours. */
	bad[0] = nop;
	bad[1] = svm_packet_fill(4096, 8, 1);
	REFUSED(svm_run(mirror, 0, bad, 2), EFAULT, "packet 1 failed at GPU address 0x1000 (write)");
	CHECK(svm_submit(mirror, 0, bad, 2, &job) == 0);
	REFUSED(svm_job_wait(job, -1), EFAULT, "nothing is mapped");
	REFUSED(svm_job_wait(job, 0), EFAULT, "nothing is mapped");
	REFUSED(svm_job_poll(job), EFAULT, "nothing is mapped");
	CHECK(svm_job_failure(job, &failure) == 0);
	CHECK(failure.error == -EFAULT && failure.packet == 1 && failure.address == 4096);
	CHECK(failure.access == SVM_ACCESS_WRITE && failure.reserved == 0);
	svm_job_free(job);
	/* A node at no multiple of 16. */
	bad[0] = svm_packet_chase(at, at + 8, 1, 0);
	REFUSED(svm_run(mirror, 0, bad, 1), EINVAL, "no node of a list");
	/* A job that ends well has not failed. */
	bad[0] = svm_packet_atomic_add(at, 3);
	CHECK(svm_submit(mirror, 63, bad, 1, &job) == 0);
	REFUSED(svm_job_wait(job, -2), EINVAL, "timeout_ms");
	CHECK(svm_job_wait(job, -1) == 1 && svm_job_poll(job) == 1 && words[0] == 3);
	REFUSED(svm_job_failure(job, &failure), EAGAIN, "not failed");
	svm_job_free(job);
	free(words);
}

/* Waits with a timeout for a job that the test holds back until it has read the line. */
static void waits(void)
{
	struct svm_job *job;

	puts("pause");
	fflush(stdout);
	CHECK(getchar() == '\n');
	CHECK(svm_submit(mirror, 0, &nop, 1, &job) == 0);
	CHECK(svm_job_poll(job) == 0 && svm_job_wait(job, 0) == 0 && svm_job_wait(job, 20) == 0);
	puts("go on");
	fflush(stdout);
	CHECK(getchar() == '\n');
	CHECK(svm_job_wait(job, -1) == 1);
	svm_job_free(job);
}

static void *many(void *argument)
{
	uint64_t *word = calloc(1, sizeof *word);
	struct svm_packet add;
	uint64_t at;

	(void)argument;
	CHECK(*svm_error() == '\0');
	CHECK(svm_device_address(mirror, word, &at) == 0);
	add = svm_packet_atomic_add(at, 1);
	for (int i = 0; i < 50; i++) {
		struct svm_job *job;
		CHECK(svm_run(mirror, 0, &add, 1) == 0);
		CHECK(svm_submit(mirror, 1, &add, 1, &job) == 0);
		if (i % 2 == 0)
			CHECK(svm_job_wait(job, -1) == 1);
		svm_job_free(job);
	}
	CHECK(*word >= 75);
	return NULL;
}

static void threads(void)
{
	pthread_t thread[4];

	CHECK(svm_fd(svm) >= 0 && svm_fd(svm) == svm_fd(svm));
	for (int i = 0; i < 4; i++)
		CHECK(pthread_create(&thread[i], NULL, many, NULL) == 0);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(thread[i], NULL) == 0);
}

int main(void)
{
	struct svm_job *job;

	CHECK(*svm_error() == '\0');
	/* One at a time, and as often as one likes. */
	for (int i = 0; i < 100; i++) {
		CHECK(svm_open(&svm) == 0);
		svm_close(svm);
	}
	CHECK(svm_open(&svm) == 0);
	CHECK(svm_mirror(svm, 0, &mirror) == 0);
	null_arguments();
	refusals();
	memory();
	jobs();
	waits();
	threads();
	/* Ended and made again; handles in any order. */
	svm_unmirror(mirror);
	CHECK(svm_mirror(svm, 0, &mirror) == 0);
	CHECK(svm_submit(mirror, 0, &nop, 1, &job) == 0);
	svm_close(svm);
	CHECK(svm_job_wait(job, -1) == 1);
	svm_unmirror(mirror);
	svm_job_free(job);
	puts("through");
	return 0;
}
