/* Large blocks come and go. */
#include "told.h"

int main(void)
{
	await();
	for (int round = 0; round < 20; round++) {
		uint64_t *blocks[4];
		for (int n = 0; n < 4; n++) {
			blocks[n] = malloc((n + 2) << 20);
			CHECK(blocks[n]);
			blocks[n][1000] = n;
		}
		for (int n = 0; n < 4; n++)
			free(blocks[n]);
	}
	tell("through", 0);
	await();
	return 0;
}
