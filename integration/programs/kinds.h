/* Memory that a shared library has: one that kinds.c is linked with, and others that it loads. */
#ifndef KINDS_H
#define KINDS_H

#include <stdint.h>

/* Of each block. */
enum { BYTES = 64 << 10 };

struct library {
	uint64_t *value; /* a global whose value is in the file */
	uint64_t *zero;  /* a global without one */
	void *block;     /* from malloc, by the library's constructor */
};

/* A global of a library would be copied into the program that names it, and so be the program's. */
const struct library *library_memory(void);

#endif
