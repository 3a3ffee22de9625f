#include "gpu.h"

#include <gpusvm.h>

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { MAX_DEVICES = 8 };

static struct svm *svm;
static struct svm_mirror *mirrors[MAX_DEVICES];
static int devices;
static atomic_uint turn;

static void open_on(int all)
{
	/* A forked child begins anew; the parent's handles are of no use to it. */
	devices = svm_open(&svm);
	if (devices == 0)
		devices = all ? svm_mirror_all(svm, mirrors, MAX_DEVICES) : svm_mirror(svm, 0, mirrors);
	if (devices < 0) {
		printf("FAILED: %s\n", svm_error());
		fflush(stdout);
		_exit(6);
	}
	if (!all)
		devices = 1;
}

void gpu_open(void)
{
	open_on(0);
}

void gpu_open_all(void)
{
	open_on(1);
}

static struct svm_mirror *next_mirror(void)
{
	return mirrors[atomic_fetch_add(&turn, 1) % (unsigned)devices];
}

static uint64_t address(struct svm_mirror *mirror, const void *pointer)
{
	uint64_t found = 0;

	/* What is not in reach is told by the job. */
	svm_device_address(mirror, pointer, &found);
	return found;
}

int gpu_sum(const void *from, size_t bytes, uint64_t *sum)
{
	struct svm_mirror *mirror = next_mirror();
	uint64_t *out = malloc(sizeof(*out));
	struct svm_packet packet;
	int status;

	if (out == NULL)
		return -1;
	packet = svm_packet_reduce(address(mirror, out), address(mirror, from), bytes);
	status = svm_run(mirror, 0, &packet, 1);
	*sum = *out;
	free(out);
	return status;
}

static struct svm_packet fill(struct svm_mirror *mirror, void *to, size_t bytes, uint64_t word)
{
	return svm_packet_fill(address(mirror, to), bytes, word);
}

int gpu_fill(void *to, size_t bytes, uint64_t word)
{
	struct svm_mirror *mirror = next_mirror();
	struct svm_packet packet = fill(mirror, to, bytes, word);

	return svm_run(mirror, 0, &packet, 1);
}

int gpu_fill_each(void *first, size_t count, size_t step, uint64_t word)
{
	struct svm_mirror *mirror = next_mirror();
	struct svm_packet *packets = malloc(count * sizeof(*packets));
	int status;

	if (packets == NULL)
		return -1;
	for (size_t i = 0; i < count; i++)
		packets[i] = fill(mirror, (char *)first + i * step, 8, word);
	status = svm_run(mirror, 0, packets, count);
	free(packets);
	return status;
}

struct gpu_job *gpu_begin_fill(void *to, size_t bytes, uint64_t word)
{
	struct svm_mirror *mirror = next_mirror();
	struct svm_packet packet = fill(mirror, to, bytes, word);
	struct svm_job *job = NULL;

	return svm_submit(mirror, 1, &packet, 1, &job) < 0 ? NULL : (struct gpu_job *)job;
}

int gpu_end(struct gpu_job *job)
{
	int status = svm_job_wait((struct svm_job *)job, -1);

	svm_job_free((struct svm_job *)job);
	return status < 0 ? status : 0;
}

const char *gpu_why(void)
{
	return svm_error();
}
