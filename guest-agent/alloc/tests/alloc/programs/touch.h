/* Whether a page may be written, found out by writing to it. */
#include "pages.h"
#include <setjmp.h>
#include <signal.h>

static sigjmp_buf back;

static void on_fault(int signal)
{
	siglongjmp(back, 1);
}

static inline int can_write(void *base, size_t page)
{
	if (sigsetjmp(back, 1))
		return 0;
	*word(base, page) = *word(base, page);
	return 1;
}
