/*
 * Several jobs at once and one loop that waits for all of them with poll(2): how a program with an event loop uses GPUs.
 *
 *	async [JOBS]
 *
 * Each job fills a block from malloc with a word of its own and sums it up again, half of them on another ring. Build and
 * run as list.c. It prints a line at the end of each job, in the order in which they end, and one at last:
 *
 *	job=3 sum=1536 ok
 *	jobs=8 wrong=0
 */
#include <gpusvm.h>

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORDS = 512 };

struct work {
	struct svm_job *job; /* NULL once its end is known */
	uint64_t *words;     /* WORDS, and behind them their sum */
};

static int failed(const char *what)
{
	fprintf(stderr, "async: %s: %s\n", what, svm_error());
	return 1;
}

static int launch(struct svm_mirror *mirror, struct work *work, uint64_t number)
{
	struct svm_packet packets[2];
	uint64_t at;

	work->words = calloc(WORDS + 1, sizeof *work->words);
	if (work->words == NULL || svm_device_address(mirror, work->words, &at) < 0)
		return failed("memory");
	packets[0] = svm_packet_fill(at, WORDS * 8, number);
	packets[1] = svm_packet_reduce(at + WORDS * 8, at, WORDS * 8);
	if (svm_submit(mirror, number % 2, packets, 2, &work->job) < 0)
		return failed("submit");
	return 0;
}

/* Looks whether a job has ended. Returns how many did so: 0 or 1. */
static int look(struct work *work, uint64_t number, int *wrong)
{
	int ended = work->job == NULL ? 0 : svm_job_poll(work->job);

	if (ended == 0)
		return 0;
	if (ended < 0) {
		struct svm_failure failure;
		failed("job");
		if (svm_job_failure(work->job, &failure) == 0)
			fprintf(stderr, "async: job=%" PRIu64 " packet=%" PRIu32 " address=%#" PRIx64 "\n", number,
				failure.packet, failure.address);
		*wrong += 1;
	} else {
		int right = work->words[WORDS] == WORDS * number;
		printf("job=%" PRIu64 " sum=%" PRIu64 " %s\n", number, work->words[WORDS], right ? "ok" : "wrong");
		*wrong += !right;
	}
	svm_job_free(work->job);
	work->job = NULL;
	free(work->words);
	return 1;
}

int main(int argc, char **argv)
{
	size_t count = argc > 1 ? strtoull(argv[1], NULL, 10) : 8;
	struct work *works = calloc(count, sizeof *works);
	struct svm *svm;
	struct svm_mirror *mirror;
	struct pollfd ready = {-1, POLLIN, 0};
	size_t left = count;
	int wrong = 0;

	if (works == NULL && count > 0) {
		perror("async");
		return 1;
	}
	if (svm_open(&svm) < 0)
		return failed("open");
	if (svm_mirror(svm, 0, &mirror) < 0)
		return failed("mirror");
	ready.fd = svm_fd(svm);
	if (ready.fd < 0)
		return failed("descriptor");
	for (size_t i = 0; i < count; i++)
		if (launch(mirror, &works[i], i) != 0)
			return 1;
	while (left > 0) {
		/* Sockets, timers and whatever else the program waits for go here too. */
		if (poll(&ready, 1, -1) < 0)
			continue;
		for (size_t i = 0; i < count; i++)
			left -= look(&works[i], i, &wrong);
	}
	printf("jobs=%zu wrong=%d\n", count, wrong);
	svm_unmirror(mirror);
	svm_close(svm);
	free(works);
	return wrong != 0;
}
