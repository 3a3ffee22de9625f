/* An ordinary program: a list built with malloc, some of it freed again. */
#include "told.h"

struct node {
	struct node *next;
	uint64_t value;
	char padding[];
};

int main(void)
{
	struct node *first = NULL;
	uint64_t sum = 0;
	for (uint64_t n = 0; n < 3000; n++) {
		struct node *node = malloc(sizeof *node + n * 7 % 500);
		void *between = malloc(n % 90);
		CHECK(node && between);
		node->next = first;
		node->value = n * n;
		sum += n * n;
		first = node;
		free(between);
	}
	tell_address("first", first);
	tell("sum", sum);
	await();
	/* The test has changed the first value, as a GPU would. */
	CHECK(((volatile struct node *)first)->value == 12345);
	first->next->value = 54321;
	tell("changed", 1);
	await();
	return 0;
}
