/* Memory on devices that have fewer address bits than a process, in windows that were chosen before most of it was there: a
 * list, a large block, a mapping and a global, for each device. A line each; ends with 1 if one of them is wrong. */
#define _GNU_SOURCE
#include <gpusvm.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { MOST_DEVICES = 8, NODES = 3000, LARGE = 4 << 20, PAGES = 1 << 20 };

/* As svm_packet_chase() has it: two words at a multiple of 16, where malloc puts them by itself. */
struct node {
	uint64_t next;
	uint64_t value;
};

static uint64_t global[512];
static int wrong;

static void end(const char *what)
{
	printf("%s: %s\n", what, svm_error());
	exit(1);
}

/* Where the device sees a pointer. */
static uint64_t seen(struct svm_mirror *mirror, const void *pointer)
{
	uint64_t at;

	if (svm_device_address(mirror, pointer, &at) < 0)
		end("address");
	return at;
}

static void tell(struct svm_mirror *mirror, const char *kind, const void *pointer, int right)
{
	struct svm_device device;

	if (svm_mirror_device(mirror, &device) < 0)
		end("device");
	printf("device=%s kind=%s pointer=%#" PRIxPTR " address=%#" PRIx64 " %s\n", device.name, kind, (uintptr_t)pointer,
		seen(mirror, pointer), right ? "ok" : "wrong");
	wrong |= !right;
}

/* The first half was there before the mirror. */
static struct node *longer(struct node *list)
{
	for (uint64_t i = 0; i < NODES / 2; i++) {
		struct node *node = malloc(sizeof(*node));

		if (node == NULL)
			exit(1);
		node->next = (uintptr_t)list;
		node->value = i * i;
		list = node;
	}
	return list;
}

static void walk(struct svm_mirror *mirror, const struct node *list)
{
	uint64_t *found = calloc(2, sizeof(*found)), count = 0, sum = 0, at = seen(mirror, list);
	struct svm_packet packet;

	for (const struct node *node = list; node != NULL; node = (const struct node *)node->next) {
		count++;
		sum += node->value;
	}
	packet = svm_packet_chase(seen(mirror, found), at, NODES + 1, at - (uintptr_t)list);
	if (svm_run(mirror, 0, &packet, 1) < 0)
		end("walk");
	tell(mirror, "list", list, count == NODES && found[0] == count && found[1] == sum);
	free(found);
}

/* The device sums what is there, and fills all but the last word. */
static void sum_and_fill(struct svm_mirror *mirror, const char *kind, uint64_t *words, size_t bytes)
{
	uint64_t *sum = malloc(sizeof(*sum)), expected = 0;
	size_t last = bytes / 8 - 1, same = 0;
	struct svm_packet packets[2];

	for (uint64_t i = 0; i <= last; i++)
		expected += words[i] = i * 0x9e3779b97f4a7c15U;
	packets[0] = svm_packet_reduce(seen(mirror, sum), seen(mirror, words), bytes);
	packets[1] = svm_packet_fill(seen(mirror, words), bytes - 8, 7);
	if (svm_run(mirror, 0, packets, 2) < 0)
		end(kind);
	while (same < last && words[same] == 7)
		same++;
	tell(mirror, kind, words, *sum == expected && same == last && words[last] == last * 0x9e3779b97f4a7c15U);
	free(sum);
}

int main(void)
{
	struct svm_mirror *mirrors[MOST_DEVICES];
	struct node *list = longer(NULL);
	struct svm *svm;
	int devices;

	if (svm_open(&svm) < 0 || (devices = svm_mirror_all(svm, mirrors, MOST_DEVICES)) < 0)
		end("mirror");
	list = longer(list);
	for (int i = 0; i < devices; i++) {
		uint64_t *large = malloc(LARGE), *pages;

		pages = mmap(NULL, PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (large == NULL || pages == MAP_FAILED)
			return 1;
		walk(mirrors[i], list);
		sum_and_fill(mirrors[i], "large", large, LARGE);
		sum_and_fill(mirrors[i], "mapping", pages, PAGES);
		sum_and_fill(mirrors[i], "global", global, sizeof(global));
		munmap(pages, PAGES);
		free(large);
	}
	printf("done\n");
	return wrong;
}
