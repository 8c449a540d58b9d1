#include "starts.h"

#include "parallel.h"
#include "rows.h"

enum { CHUNK = 64 }; /* rows counted by one thread at a time */

typedef struct {
    const srt_rows *rows;
    const uint8_t *meta;
    int64_t *starts, m, n;
} counting;

static void run_count(void *context, int64_t chunk)
{
    const counting *c = context;
    for (int64_t row = chunk * CHUNK; row < srt_min((chunk + 1) * CHUNK, c->m); row++)
        c->starts[row + 1] = c->rows->count(c->meta + row * ((c->n + 7) / 8), c->n);
}

int64_t srt_find_starts(int64_t *starts, const uint8_t *meta, int nibbles, int64_t m, int64_t n, int threads)
{
    counting c = {.rows = srt_chosen_rows(), .meta = meta, .starts = starts, .m = m, .n = n};
    if (!nibbles)
        srt_parallel(m * n < SRT_SERIAL_BELOW ? 1 : threads, (m + CHUNK - 1) / CHUNK, run_count, &c);
    starts[0] = 0;
    for (int64_t row = 0; row < m; row++)
        starts[row + 1] = starts[row] + (nibbles ? n / 2 : starts[row + 1]);
    return starts[m];
}
