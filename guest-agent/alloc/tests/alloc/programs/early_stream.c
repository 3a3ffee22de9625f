/* Shows the stream of the library early.c. */
#include "told.h"

extern FILE *early;

int main(void)
{
	CHECK(early && fputs("some text", early) >= 0);
	tell_address("stream", early);
	await();
	return 0;
}
