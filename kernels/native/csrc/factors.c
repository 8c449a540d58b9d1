/* A weight whose kept values carry a factor of their row and of their column, as in SPP:
 *
 *     out[i, j] = values[i, j] (base + scale b[i] a[g(i), j])      g(i) = i / (m / groups)
 *
 * base 1: the effective weight, base 0: the update alone. Float32 throughout, one rounding at the end. The gradients of
 * a and b are in grad.c.
 */
#include "factors.h"

#include "export.h"
#include "parallel.h"
#include "starts.h"

enum { CHUNK = 64 }; /* rows */

typedef struct {
    const srt_factors *kernels;
    const char *values;
    const uint8_t *meta;
    const float *a, *b;
    char *out;
    const int64_t *starts;
    float scale, base;
    int64_t m, n, group_rows;
    int nibbles, number, out_number;
} job;

static const srt_factors *kernels_here(void)
{
#if defined(__x86_64__)
    if (srt_chosen_rows() == &srt_rows_avx512)
        return &srt_factors_avx512;
#endif
    return NULL;
}

static void run_rows(void *context, int64_t chunk)
{
    const job *j = context;
    for (int64_t at = chunk * CHUNK; at < srt_min((chunk + 1) * CHUNK, j->m); at++) {
        srt_factor_row row = {.meta = j->meta + at * ((j->n + 7) / 8), .nibbles = j->nibbles, .number = j->number};
        row.n = j->n;
        row.values = j->values + j->starts[at] * srt_number_bytes(j->number);
        row.a = j->a + at / j->group_rows * j->n;
        row.b = j->scale * j->b[at];
        j->kernels->apply(&row, j->base, j->out + j->starts[at] * srt_number_bytes(j->out_number), j->out_number);
    }
}

/* out = values (base + scale b a), see above. values and out: `kept` of type `number` and `out_number`; a [groups, n],
 * b [m] float32; starts: room for m + 1. Returns how many values the metadata marks, and does nothing else where that
 * is not `kept`; -1 for arguments that make no sense and on processors without a kernel. */
EXPORT int64_t
srt_factors_apply(const void *values, int number, int64_t kept, const uint8_t *meta, int nibbles, int64_t m, int64_t n,
                  const float *a, const float *b, float scale, int64_t groups, float base, void *out, int out_number,
                  int64_t *starts, int threads)
{
    if (!kernels_here() || number < 0 || number >= SRT_NUMBERS || out_number < 0 || out_number >= SRT_NUMBERS ||
        m < 1 || n < 1 || m > INT32_MAX || n > INT32_MAX || groups < 1 || m % groups != 0 || (nibbles && n % 4 != 0))
        return -1;
    int64_t marked = srt_find_starts(starts, meta, nibbles, m, n, threads);
    if (marked != kept)
        return marked;
    job j = {.kernels = kernels_here(), .values = values, .meta = meta, .a = a, .b = b, .out = out, .starts = starts};
    j.scale = scale, j.base = base, j.m = m, j.n = n, j.group_rows = m / groups;
    j.nibbles = nibbles, j.number = number, j.out_number = out_number;
    srt_parallel(m * n < SRT_SERIAL_BELOW ? 1 : threads, (m + CHUNK - 1) / CHUNK, run_rows, &j);
    return marked;
}
