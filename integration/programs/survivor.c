/* A program that outlives the agent that its memory came from. It knows nothing of that, but for what it is told:
 *
 *   join      mirrors its memory on the first device, in the context of its allocator
 *   sum       has the device sum a block of its memory
 *   leave     ends that
 *   connect   has the device sum memory of a context of its own, from beginning to end
 *   whole     looks whether all of its memory is as it must be, and takes some of it anew
 *
 * Each is answered by a line of JSON: 0, a negative errno and why, or a positive number where something is not as it
 * must be. */
#include <gpusvm.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCKS = 32, WORDS = 8192, LARGE = 1 << 20 };

static uint64_t *blocks[BLOCKS];
static uint64_t global[WORDS];
static size_t turn;
static struct svm *svm;
static struct svm_mirror *mirror;

static uint64_t word(size_t block, size_t index)
{
	return ((uint64_t)block << 32 | index) * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

static void fill(uint64_t *words, size_t count, size_t block)
{
	for (size_t i = 0; i < count; i++)
		words[i] = word(block, i);
}

static int holds(const uint64_t *words, size_t count, size_t block)
{
	for (size_t i = 0; i < count; i++)
		if (words[i] != word(block, i))
			return 0;
	return 1;
}

static uint64_t *make(size_t count, size_t block)
{
	uint64_t *words = malloc(count * sizeof(*words));

	if (words == NULL)
		exit(3);
	fill(words, count, block);
	return words;
}

static int whole(void)
{
	uint64_t *large = make(LARGE, BLOCKS + 1);
	int good = holds(large, LARGE, BLOCKS + 1) && holds(global, WORDS, BLOCKS);

	free(large);
	free(blocks[turn % BLOCKS]);
	blocks[turn % BLOCKS] = make(WORDS, turn % BLOCKS);
	turn++;
	for (size_t block = 0; block < BLOCKS; block++)
		good = good && holds(blocks[block], WORDS, block);
	return good ? 0 : 1;
}

static int sum(struct svm_mirror *on, const uint64_t *words, uint64_t *out)
{
	uint64_t expected = 0, from = 0, to = 0;
	struct svm_packet packet;
	int status;

	/* What is not in reach is told by the job. */
	svm_device_address(on, words, &from);
	svm_device_address(on, out, &to);
	packet = svm_packet_reduce(to, from, WORDS * sizeof(*words));
	status = svm_run(on, 0, &packet, 1);
	for (size_t i = 0; i < WORDS; i++)
		expected += words[i];
	return status < 0 ? status : *out == expected ? 0 : 1;
}

static int join(void)
{
	int status = svm_open(&svm);

	return status < 0 ? status : svm_mirror(svm, 0, &mirror);
}

static int leave(void)
{
	if (mirror != NULL)
		svm_unmirror(mirror);
	if (svm != NULL)
		svm_close(svm);
	mirror = NULL;
	svm = NULL;
	return 0;
}

static int connect_anew(void)
{
	struct svm_mirror *own_mirror = NULL;
	struct svm *own = NULL;
	void *memory = NULL;
	int status = svm_connect(NULL, &own);

	if (status == 0)
		status = svm_map(own, NULL, (WORDS + 1) * sizeof(uint64_t), &memory);
	if (status == 0)
		status = svm_mirror(own, 0, &own_mirror);
	if (status == 0) {
		fill(memory, WORDS, BLOCKS + 2);
		status = sum(own_mirror, memory, (uint64_t *)memory + WORDS);
	}
	if (own_mirror != NULL)
		svm_unmirror(own_mirror);
	if (own != NULL)
		svm_close(own);
	return status;
}

int main(void)
{
	static uint64_t out;
	char line[32];

	fill(global, WORDS, BLOCKS);
	for (size_t block = 0; block < BLOCKS; block++)
		blocks[block] = make(WORDS, block);
	while (fgets(line, sizeof(line), stdin) != NULL) {
		int status = 2;

		line[strcspn(line, "\n")] = '\0';
		if (strcmp(line, "join") == 0)
			status = join();
		else if (strcmp(line, "sum") == 0)
			status = sum(mirror, blocks[0], &out);
		else if (strcmp(line, "leave") == 0)
			status = leave();
		else if (strcmp(line, "connect") == 0)
			status = connect_anew();
		else if (strcmp(line, "whole") == 0)
			status = whole();
		printf("{\"status\": %d, \"why\": \"%s\"}\n", status, status < 0 ? svm_error() : "");
		fflush(stdout);
	}
	return 0;
}
