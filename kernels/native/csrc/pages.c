/* What the system is told about memory. It may refuse: nothing depends on it. */
#define _GNU_SOURCE
#include "pages.h"

#include <sys/mman.h>

/* Asks for 2 MB pages where whole ones fit into [start, start + bytes): a stream of weights crosses a 4 KB page every
 * 150 ns, and where it does the processor's own prefetch stops (Zen 4, 11008 x 4096 dense bf16: 3.4 ms instead of 5.2).
 * Call it before the first write. */
EXPORT void srt_advise_huge(void *start, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    uintptr_t huge = (uintptr_t)2 << 20, from = ((uintptr_t)start + huge - 1) / huge * huge;
    uintptr_t to = ((uintptr_t)start + (uintptr_t)bytes) / huge * huge;
    if (to > from)
        madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* Takes whole pages of a file out of memory (Linux 5.4 and later); nothing in them is lost. */
EXPORT void srt_page_out(void *start, int64_t bytes)
{
#ifdef MADV_PAGEOUT
    madvise(start, (size_t)bytes, MADV_PAGEOUT);
#else
    (void)start, (void)bytes;
#endif
}
