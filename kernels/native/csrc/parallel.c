/* Threads through the OpenMP runtime that torch uses too: the same team, so no two sets of threads fight for cores. */
#include "parallel.h"

#include <pthread.h>

#include "export.h"

static int forked;

/* 1 where the compiler gave us OpenMP, otherwise every call runs on one thread. */
EXPORT int srt_has_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* GNU OpenMP cannot start a team in a child of a process that already had one: it waits for threads that fork() did
 * not copy. Children therefore stay on one thread. */
static void after_fork_in_child(void) { forked = 1; }

__attribute__((constructor)) static void on_load(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

int srt_threads_for(int threads) { return forked || !srt_has_threads() || threads < 1 ? 1 : threads; }

static void take_chunks(int64_t *next, int64_t chunks, void (*run)(void *context, int64_t chunk), void *context)
{
    int64_t chunk;
    while ((chunk = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < chunks)
        run(context, chunk);
}

void srt_parallel(int threads, int64_t chunks, void (*run)(void *context, int64_t chunk), void *context)
{
    int64_t next = 0;
    threads = srt_threads_for(threads);
    if (threads > chunks)
        threads = chunks > 1 ? (int)chunks : 1;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        take_chunks(&next, chunks, run, context);
        return;
    }
#endif
    take_chunks(&next, chunks, run, context);
}
