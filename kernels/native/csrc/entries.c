/* The C ABI of the native backend (called through ctypes) and the choice of row kernels.
 *
 * Every entry works on whole matrices [m, n] in row-major order and returns the number of values the metadata asks for,
 * or a negative number for arguments that make no sense. It touches nothing outside the buffers it was given, whatever
 * the metadata says: the caller compares the returned number with the values it has.
 */
#include <sched.h>

#include "export.h"
#include "parallel.h"
#include "rows.h"

/* Several chunks of rows a thread, taken on demand: a core that is busy elsewhere holds up an eighth of its share. The
 * metadata of a chunk is read twice (counted, then used), so it should stay in the second-level cache meanwhile. */
enum { CHUNKS_PER_THREAD = 8, CHUNK_METADATA_BYTES = 65536, MAX_CHUNKS = 1024 };
/* Dense results larger than both of these leave the caches before the next reader comes, so they are written past
 * them: 25 against 20 GB/s a core on Zen 4. */
static const int64_t STREAM_FROM_BYTES = 16 << 20, STREAM_FROM_BYTES_PER_THREAD = 2 << 20;

static const srt_rows *rows = &srt_rows_scalar;

/* ---- instruction set ------------------------------------------------------------------------------------------ */

static const srt_rows *const best_first[] = {
#if defined(__x86_64__)
    &srt_rows_avx512,
    &srt_rows_avx2,
#endif
    &srt_rows_scalar,
};

/* Chooses the row kernels by name, or with "" the best that this processor runs. 0, or -1 where there are none. */
EXPORT int srt_use_isa(const char *name)
{
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if ((name[0] == '\0' || strcmp(name, best_first[i]->name) == 0) && best_first[i]->supported()) {
            rows = best_first[i];
            return 0;
        }
    return -1;
}

const srt_rows *srt_chosen_rows(void) { return rows; }

EXPORT const char *srt_isa(void) { return rows->name; }

__attribute__((constructor)) static void on_load(void) { srt_use_isa(""); }

/* ---- jobs ------------------------------------------------------------------------------------------------------ */

typedef struct job {
    void (*run)(void *job, int64_t chunk);
    const srt_rows *rows;
    const char *in;      /* expand: values; gather: dense */
    const uint8_t *meta; /* bitmask or nibbles */
    char *out;           /* expand: dense; gather: values */
    int64_t m, n, nnz, size, meta_stride, chunks;
    int pair, threads, stream, gather; /* pair: which of the two element sizes */
    int64_t starts[MAX_CHUNKS + 1];    /* first value of every chunk; -1: not known yet */
} job;

/* Fills what all entries share. 0, or -1 for arguments that make no sense. */
static int prepare(job *j, int64_t m, int64_t n, int element_size, int threads)
{
    if (m < 0 || n < 0 || (element_size != 2 && element_size != 4))
        return -1;
    threads = n == 0 || m < SRT_SERIAL_BELOW / n ? 1 : srt_threads_for(threads);
    *j = (job){.rows = rows, .m = m, .n = n, .size = element_size, .meta_stride = (n + 7) / 8, .threads = threads};
    j->pair = element_size == 4;
    int64_t bytes = m * n * element_size;
    j->stream = bytes >= STREAM_FROM_BYTES && bytes >= threads * STREAM_FROM_BYTES_PER_THREAD;
    j->chunks = m * j->meta_stride / CHUNK_METADATA_BYTES + 1;
    if (j->chunks < (int64_t)threads * CHUNKS_PER_THREAD)
        j->chunks = (int64_t)threads * CHUNKS_PER_THREAD;
    j->chunks = srt_min(threads == 1 ? 1 : j->chunks, srt_min(m, MAX_CHUNKS));
    return 0;
}

static int64_t first_row(const job *j, int64_t chunk) { return j->m * chunk / j->chunks; }

/* ---- bitmask -------------------------------------------------------------------------------------------------- */

/* The first value of a chunk. Whoever took the chunk before publishes it as soon as it has counted its own rows, and
 * chunks are taken in order, so somebody is always counting: the wait is short and needs no barrier. */
static int64_t wait_for_start(job *j, int64_t chunk)
{
    int64_t start;
    for (int spins = 0; (start = __atomic_load_n(&j->starts[chunk], __ATOMIC_ACQUIRE)) < 0; spins++)
        if (spins > 1000)
            sched_yield();
    return start;
}

static int64_t count_rows(const job *j, int64_t row, int64_t last)
{
    int64_t kept = 0;
    for (; row < last; row++)
        kept += j->rows->count(j->meta + row * j->meta_stride, j->n);
    return kept;
}

/* Moves rows [row, last), whose values are [start, stop) or end earlier. Returns how many the bitmask has. */
static int64_t move_rows(const job *j, int64_t row, int64_t last, int64_t start, int64_t stop)
{
    const char *values = j->in + start * j->size, *values_end = j->in + j->nnz * j->size;
    char *packed = j->out + start * j->size, *packed_end = j->out + stop * j->size;
    int64_t kept = 0;
    for (; row < last; row++) {
        const uint8_t *bits = j->meta + row * j->meta_stride;
        int64_t dense = row * j->n * j->size, moved;
        if (j->gather) {
            char *from = packed;
            packed = j->rows->gather[j->pair](j->in + dense, bits, from, packed_end, j->n);
            moved = packed < packed_end ? (packed - from) / j->size : -1;
        } else {
            const char *from = values;
            values = j->rows->expand[j->pair](from, values_end, bits, j->out + dense, j->n, j->stream);
            moved = values < values_end ? (values - from) / j->size : -1;
        }
        kept += moved >= 0 ? moved : count_rows(j, row, row + 1); /* at the end the row may have wanted more */
    }
    j->rows->finish();
    return kept;
}

static void run_bitmask(void *context, int64_t chunk)
{
    job *j = context;
    int64_t row = first_row(j, chunk), last = first_row(j, chunk + 1);
    if (j->threads == 1) { /* one chunk: the rows follow each other, nothing needs counting beforehand */
        j->starts[1] = move_rows(j, row, last, 0, j->nnz);
        return;
    }
    int64_t kept = count_rows(j, row, last);
    int64_t start = wait_for_start(j, chunk), stop = start + kept;
    __atomic_store_n(&j->starts[chunk + 1], stop, __ATOMIC_RELEASE);
    if (stop <= j->nnz)
        move_rows(j, row, last, start, stop);
}

static int64_t bitmask(job *j, int64_t nnz)
{
    j->run = run_bitmask;
    j->nnz = nnz;
    for (int64_t chunk = 1; chunk <= j->chunks; chunk++)
        j->starts[chunk] = -1;
    srt_parallel(j->threads, j->chunks, j->run, j);
    return j->starts[j->chunks];
}

/* out [m, n] = the nnz values at the set bits of bitmask [m, ceil(n/8)], zero elsewhere. Returns the number of set
 * bits; out is complete only where that is at most nnz. */
EXPORT int64_t srt_expand_bitmask(const void *values, int64_t nnz, const uint8_t *meta, void *out, int64_t m, int64_t n,
                                  int element_size, int threads)
{
    job j;
    if (prepare(&j, m, n, element_size, threads) < 0)
        return -1;
    j.in = values, j.meta = meta, j.out = out;
    return bitmask(&j, nnz);
}

/* values [room] = dense [m, n] at the set bits. Returns their number; values is complete only where that is at most
 * room. */
EXPORT int64_t srt_gather_bitmask(const void *dense, const uint8_t *meta, void *values, int64_t room, int64_t m,
                                  int64_t n, int element_size, int threads)
{
    job j;
    if (prepare(&j, m, n, element_size, threads) < 0)
        return -1;
    j.in = dense, j.meta = meta, j.out = values, j.gather = 1;
    return bitmask(&j, room);
}

/* ---- 2:4 ------------------------------------------------------------------------------------------------------ */

static void run_pairs(void *context, int64_t chunk)
{
    const job *j = context;
    for (int64_t row = first_row(j, chunk); row < first_row(j, chunk + 1); row++) {
        const uint8_t *meta = j->meta + row * j->meta_stride;
        int64_t dense = row * j->n * j->size, packed = dense / 2;
        if (j->gather)
            j->rows->gather24[j->pair](j->in + dense, meta, j->out + packed, j->n);
        else
            j->rows->expand24[j->pair](j->in + packed, meta, j->out + dense, j->n, j->stream);
    }
    j->rows->finish();
}

static int64_t pairs(const void *in, const uint8_t *meta, void *out, int64_t m, int64_t n, int element_size,
                     int threads, int gather)
{
    job j;
    if (n % 4 != 0 || prepare(&j, m, n, element_size, threads) < 0)
        return -1;
    j.in = in, j.meta = meta, j.out = out, j.gather = gather, j.run = run_pairs;
    srt_parallel(j.threads, j.chunks, j.run, &j);
    return m * n / 2;
}

/* out [m, n] from values [m, n/2] and nibbles [m, ceil(n/8)]. Returns m * n / 2. */
EXPORT int64_t srt_expand_24(const void *values, const uint8_t *meta, void *out, int64_t m, int64_t n, int element_size,
                             int threads)
{
    return pairs(values, meta, out, m, n, element_size, threads, 0);
}

/* values [m, n/2] = dense [m, n] at the kept columns. Returns m * n / 2. */
EXPORT int64_t srt_gather_24(const void *dense, const uint8_t *meta, void *values, int64_t m, int64_t n,
                             int element_size, int threads)
{
    return pairs(dense, meta, values, m, n, element_size, threads, 1);
}
