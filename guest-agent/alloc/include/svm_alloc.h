/* What libsvm_alloc.so offers beside malloc and its relatives. */
#ifndef SVM_ALLOC_H
#define SVM_ALLOC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The context of the agent that has this process' memory. Another connection of the process may join it. */
struct svm_alloc_session {
	uint32_t ctx_id;
	/* The agent's socket, ended by a zero. */
	char socket[108];
};

/* Returns 0, or ENOTCONN where GPUs do not reach this process' memory. A forked child has a context of its own. The first
 * call brings what memory the process has by then into reach, while its other threads stand still (svm_open in gpusvm.h). */
int svm_alloc_session(struct svm_alloc_session *out);

/* Memory that the program has mapped readable and writable, and that GPUs do not reach all the same: the agent refused
 * it, or it is of a size that the library leaves alone. */
struct svm_alloc_left {
	/* Calls of mmap, mremap and remap_file_pages since the program began, and mappings that stayed so when it first asked
	 * for a device. */
	uint64_t mappings;
	uint64_t bytes;
};

void svm_alloc_left(struct svm_alloc_left *out);

/* Why GPUs do not reach an address of this process, and what to do: text for people, ended by a zero and cut to `room`
 * bytes. `start` and `end`: the kernel's mapping that holds it, as /proc/self/maps has it. Returns how many bytes the text
 * has, or 0: they reach it, or it is not known. */
size_t svm_alloc_why(const void *address, const void *start, const void *end, char *out, size_t room);

#ifdef __cplusplus
}
#endif

#endif
