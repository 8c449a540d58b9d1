/* One buffer a thread, for what a product needs besides its operands. It grows and stays: fresh pages would cost more
 * than what is written to them. Whoever asks for it keeps the size bounded, however long a prompt is. */
#include "buffer.h"

#include <pthread.h>
#include <stdlib.h>

#include "packed.h"
#include "pages.h"

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20 };

static __thread struct {
    char *start;
    int64_t bytes;
} buffer;
static pthread_key_t at_thread_exit;
static int has_key;

static void free_buffer(void *start) { free(start); }

__attribute__((constructor)) static void on_load(void)
{
    has_key = pthread_key_create(&at_thread_exit, free_buffer) == 0;
}

char *srt_thread_buffer(int64_t bytes)
{
    if (!has_key) /* what nobody frees must not be taken */
        return NULL;
    if (bytes > buffer.bytes) {
        free(buffer.start);
        buffer.bytes = 0;
        int64_t alignment = bytes < HUGE_PAGE ? ALIGNMENT : HUGE_PAGE;
        buffer.start = aligned_alloc((size_t)alignment, (size_t)srt_round_up(bytes, alignment));
        if (buffer.start)
            srt_advise_huge(buffer.start, bytes);
        pthread_setspecific(at_thread_exit, buffer.start);
        if (buffer.start)
            buffer.bytes = bytes;
    }
    return buffer.start;
}
