/* A program under test ends where something is not as it must be. */
#include <gpusvm.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                        \
	do {                                                                                    \
		if (!(condition)) {                                                             \
			fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, svm_error()); \
			exit(1);                                                                \
		}                                                                               \
	} while (0)
