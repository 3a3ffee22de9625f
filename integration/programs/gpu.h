/* What the test programs ask of a device: sums and fills of words by plain pointers. */
#ifndef GPU_H
#define GPU_H

#include <stddef.h>
#include <stdint.h>

/* Joins the process' context and mirrors its memory on the first device. Ends the program if that cannot be had. To be
 * called again in a forked child. */
void gpu_open(void);

/* As gpu_open, on all devices: what follows is asked of one after the other. */
void gpu_open_all(void);

/* The wrapping sum of the words in `bytes` at `from`, by the device. 0, or a negative errno; then gpu_why() says why. */
int gpu_sum(const void *from, size_t bytes, uint64_t *sum);

/* `bytes` at `to` with the word, by the device. As gpu_sum. */
int gpu_fill(void *to, size_t bytes, uint64_t word);

/* The word at `count` places that are `step` bytes apart, by one job. As gpu_sum. */
int gpu_fill_each(void *first, size_t count, size_t step, uint64_t word);

/* As gpu_fill, but goes on while it runs. NULL: it was not taken. gpu_end() waits, and says how it ended: 0, or a negative
 * errno. */
struct gpu_job;
struct gpu_job *gpu_begin_fill(void *to, size_t bytes, uint64_t word);
int gpu_end(struct gpu_job *job);

/* Why the last call of this thread failed. */
const char *gpu_why(void);

#endif
