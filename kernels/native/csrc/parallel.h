/* Threads of the native backend: one way to share chunks of work, used by every kernel. */
#ifndef SPARSE_RT_PARALLEL_H
#define SPARSE_RT_PARALLEL_H

#include <stdint.h>

/* How many threads a call may use of those asked for: 1 in a forked child, without OpenMP and for less than 1. */
int srt_threads_for(int threads);

/* Calls run(context, chunk) for every chunk in [0, chunks), which are handed out on demand in increasing order: a core
 * that is busy elsewhere takes fewer. Returns when all are done, and what they wrote with ordinary stores is visible to
 * the caller; a run() that streams past the caches ends with a store fence of its own. With one thread everything runs
 * on the calling thread, in order. */
void srt_parallel(int threads, int64_t chunks, void (*run)(void *context, int64_t chunk), void *context);

#endif
