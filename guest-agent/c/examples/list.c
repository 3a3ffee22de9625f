/*
 * An ordinary program with a linked list, which every GPU of this guest walks where it is.
 *
 *	list [NODES [SEED]]
 *
 * The list comes from malloc, in an order that jumps about, with values that follow from SEED; count and sum go into a
 * block from malloc. Nothing is copied and nothing is registered. Build and run:
 *
 *	cc list.c $(pkg-config --cflags --libs gpusvm) -o list
 *	svm-agent run -- ./list 1000 7
 *
 * It prints a line for each device, and ends with 1 if one of them found something else than the program itself:
 *
 *	device=0 name=soft0 pointer=0x7f2a3c000010 address=0x7f2a3c000010 nodes=1000 sum=5242881 expected=5242881 ok
 */
#include <gpusvm.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* As svm_packet_chase() has it: two words at a multiple of 16, where malloc puts them by itself. */
struct node {
	uint64_t next;
	uint64_t value;
};

/* What the device stores. */
struct found {
	uint64_t nodes;
	uint64_t sum;
};

static uint64_t state;

static uint64_t random_word(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static int failed(const char *what)
{
	fprintf(stderr, "list: %s: %s\n", what, svm_error());
	return 1;
}

/* Makes a list of `count` nodes; the sum of its values goes to `sum`. */
static struct node *make_list(size_t count, uint64_t *sum)
{
	struct node **nodes = malloc(count * sizeof *nodes);
	struct node *first = NULL;

	if (nodes == NULL)
		return NULL;
	for (size_t i = 0; i < count; i++) {
		nodes[i] = malloc(sizeof **nodes);
		if (nodes[i] == NULL)
			abort();
	}
	/* Links follow no order of addresses. */
	for (size_t i = count - 1; i > 0; i--) {
		size_t other = random_word() % (i + 1);
		struct node *swapped = nodes[i];
		nodes[i] = nodes[other];
		nodes[other] = swapped;
	}
	*sum = 0;
	for (size_t i = 0; i < count; i++) {
		nodes[i]->next = (uintptr_t)first;
		nodes[i]->value = random_word() >> 16;
		*sum += nodes[i]->value;
		first = nodes[i];
	}
	free(nodes);
	return first;
}

/* Has a device walk the list. 0: it found what is there. */
static int walk(struct svm_mirror *mirror, const struct node *list, size_t count, uint64_t sum)
{
	struct found *found = calloc(1, sizeof *found);
	struct svm_device device;
	struct svm_packet packet;
	uint64_t at, result;
	int right;

	if (found == NULL || svm_mirror_device(mirror, &device) < 0)
		return failed("device");
	if ((device.opcodes >> SVM_OP_CHASE & 1) == 0) {
		printf("device=%" PRIu32 " name=%s walks no lists\n", device.dev_id, device.name);
		free(found);
		return 0;
	}
	if (svm_device_address(mirror, list, &at) < 0 || svm_device_address(mirror, found, &result) < 0)
		return failed("address");
	/* One more than there are: a walk that does not end where it should is seen. */
	packet = svm_packet_chase(result, at, count + 1, at - (uintptr_t)list);
	if (svm_run(mirror, 0, &packet, 1) < 0)
		return failed("walk");
	right = found->nodes == count && found->sum == sum;
	printf("device=%" PRIu32 " name=%s pointer=%p address=%#" PRIx64 " nodes=%" PRIu64 " sum=%" PRIu64 " expected=%" PRIu64
		" %s\n", device.dev_id, device.name, (const void *)list, at, found->nodes, found->sum, sum,
		right ? "ok" : "wrong");
	free(found);
	return !right;
}

int main(int argc, char **argv)
{
	enum { MOST_DEVICES = 64 };
	struct svm_mirror *mirrors[MOST_DEVICES];
	struct svm *svm;
	size_t count = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
	int devices, wrong = 0;
	uint64_t sum;
	struct node *list;

	state = argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 7;
	if (count == 0) {
		fprintf(stderr, "usage: list [NODES [SEED]]\n");
		return 2;
	}
	list = make_list(count, &sum);
	if (list == NULL) {
		perror("list");
		return 1;
	}
	if (svm_open(&svm) < 0)
		return failed("open");
	devices = svm_mirror_all(svm, mirrors, MOST_DEVICES);
	if (devices < 0)
		return failed("mirror");
	for (int i = 0; i < devices; i++) {
		wrong |= walk(mirrors[i], list, count, sum);
		svm_unmirror(mirrors[i]);
	}
	svm_close(svm);
	while (list != NULL) {
		struct node *next = (struct node *)(uintptr_t)list->next;
		free(list);
		list = next;
	}
	return wrong;
}
