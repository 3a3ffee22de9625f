#include "gpu.h"

#include <gpusvm.h>

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static struct svm *svm;
static struct svm_mirror *mirror;

void gpu_open(void)
{
	/* A forked child begins anew; the parent's handles are of no use to it. */
	if (svm_open(&svm) < 0 || svm_mirror(svm, 0, &mirror) < 0) {
		printf("FAILED: %s\n", svm_error());
		fflush(stdout);
		_exit(6);
	}
}

static uint64_t address(const void *pointer)
{
	uint64_t found = 0;

	/* What is not in reach is told by the job. */
	svm_device_address(mirror, pointer, &found);
	return found;
}

int gpu_sum(const void *from, size_t bytes, uint64_t *sum)
{
	uint64_t *out = malloc(sizeof(*out));
	struct svm_packet packet;
	int status;

	if (out == NULL)
		return -1;
	packet = svm_packet_reduce(address(out), address(from), bytes);
	status = svm_run(mirror, 0, &packet, 1);
	*sum = *out;
	free(out);
	return status;
}

int gpu_fill(void *to, size_t bytes, uint64_t word)
{
	struct svm_packet packet = svm_packet_fill(address(to), bytes, word);

	return svm_run(mirror, 0, &packet, 1);
}

struct gpu_job *gpu_begin_fill(void *to, size_t bytes, uint64_t word)
{
	struct svm_packet packet = svm_packet_fill(address(to), bytes, word);
	struct svm_job *job = NULL;

	return svm_submit(mirror, 1, &packet, 1, &job) < 0 ? NULL : (struct gpu_job *)job;
}

int gpu_end(struct gpu_job *job)
{
	int status = svm_job_wait((struct svm_job *)job, -1);

	svm_job_free((struct svm_job *)job);
	return status;
}

const char *gpu_why(void)
{
	return svm_error();
}
