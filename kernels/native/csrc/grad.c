/* values_grad and the gradients of factors: packs dY and X, hands blocks of rows to the tile kernels. See grad.h. */
#include "grad.h"
#include "parallel.h"
#include "starts.h"

#define EXPORT __attribute__((visibility("default")))

/* Column units of x packed together, so that a token gives more than two cache lines at a time. */
enum { UNITS_A_CHUNK = 8 };
enum { MAX_TOKENS = 1 << 16 };

typedef struct {
    const srt_grad *kernels;
    const char *dy, *x;
    const uint8_t *meta;
    const char *values; /* written by srt_values_grad */
    uint32_t *packed_dy, *packed_x;
    int64_t *starts; /* first value of every row */
    int64_t m, n, tokens, steps, x_chunks;
    int nibbles, input, number, add;

    const float *a, *b; /* of factors: [groups, n], [m]; NULL: the gradient itself is wanted */
    float *da, *db, *parts, scale;
    int64_t group_rows;
} job;

static int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

/* The kernels for inputs of this type on this processor, NULL where there are none. */
static const srt_grad *kernels_for(int input)
{
#if defined(__x86_64__)
    if (srt_chosen_rows() == &srt_rows_avx512)
        return input == SRT_BF16 && srt_grad_has_bf16() ? &srt_grad_avx512_bf16 : &srt_grad_avx512;
#endif
    (void)input;
    return NULL;
}

/* ---- packing, and the product ------------------------------------------------------------------------------------ */

static void run_pack(void *context, int64_t chunk)
{
    const job *j = context;
    if (chunk < j->x_chunks) {
        int64_t first = chunk * UNITS_A_CHUNK, last = srt_min(first + UNITS_A_CHUNK, up(j->n, GRAD_COLUMNS));
        j->kernels->pack(j->x, j->input, j->tokens, j->n, GRAD_COLUMNS, first, last, j->packed_x);
    } else {
        int64_t units = GRAD_BLOCK / GRAD_ROWS, first = (chunk - j->x_chunks) * units;
        int64_t last = srt_min(first + units, up(j->m, GRAD_ROWS));
        j->kernels->pack(j->dy, j->input, j->tokens, j->m, GRAD_ROWS, first, last, j->packed_dy);
    }
}

/* Sums of da that one thread forms alone: the rows that share a block and a group. Both boundaries raise the number, so
 * the parts of a group follow each other; where both fall together one number stays unused. */
static int64_t part_of(const job *j, int64_t row) { return row / GRAD_BLOCK + row / j->group_rows; }

static void run_block(void *context, int64_t chunk)
{
    const job *j = context;
    int64_t first = chunk * GRAD_BLOCK, stride = (j->n + 7) / 8;
    const char *values[GRAD_BLOCK];
    const float *a[GRAD_BLOCK];
    float *da[GRAD_BLOCK];
    srt_grad_block block = {.dy = j->packed_dy + first * j->steps, .x = j->packed_x, .steps = j->steps, .n = j->n};
    block.rows = srt_min(GRAD_BLOCK, j->m - first);
    block.meta = j->meta + first * stride, block.meta_stride = stride, block.nibbles = j->nibbles;
    block.number = j->number, block.add = j->add, block.values = values;
    for (int64_t row = 0; row < block.rows; row++)
        values[row] = j->values + j->starts[first + row] * srt_number_bytes(j->number);
    if (j->a) {
        int64_t from = part_of(j, first), last = part_of(j, first + block.rows - 1);
        memset(j->parts + from * j->n, 0, (size_t)((last + 1 - from) * j->n) * sizeof(float));
        for (int64_t row = 0; row < block.rows; row++) {
            a[row] = j->a + (first + row) / j->group_rows * j->n;
            da[row] = j->parts + part_of(j, first + row) * j->n;
        }
        block.a = a, block.da = da, block.b = j->b + first, block.db = j->db + first, block.scale = j->scale;
    }
    j->kernels->block(&block);
}

/* ---- arguments ---------------------------------------------------------------------------------------------------- */

static int64_t packed_elements(int64_t m, int64_t n, int64_t steps)
{
    return steps * (up(n, GRAD_COLUMNS) * GRAD_COLUMNS + up(m, GRAD_ROWS) * GRAD_ROWS);
}

/* Bytes of work space that srt_values_grad (groups 0) and srt_factors_grad want for this call; -1: no kernel for it
 * here, or arguments that make no sense. */
EXPORT int64_t srt_grad_bytes(int64_t m, int64_t n, int64_t tokens, int input, int64_t groups)
{
    if (m < 1 || n < 1 || tokens < 1 || m > INT32_MAX || n > INT32_MAX || tokens > MAX_TOKENS || input < 0 ||
        input >= SRT_NUMBERS || groups < 0 || (groups > 0 && m % groups != 0) || !kernels_for(input))
        return -1;
    int64_t elements = packed_elements(m, n, up(tokens, kernels_for(input)->tokens_a_step));
    int64_t parts = groups ? up(m, GRAD_BLOCK) + groups : 0;
    return 4 * (elements + parts * n) + 8 * (m + 1) + 3 * 64;
}

static char *aligned(void *at) { return (char *)(((uintptr_t)at + 63) / 64 * 64); }

/* Fills what both entries share. Returns the number of kept positions, or -1. */
static int64_t prepare(job *j, void *work, int64_t work_bytes, int64_t groups, int threads)
{
    int64_t needed = srt_grad_bytes(j->m, j->n, j->tokens, j->input, groups);
    if (needed < 0 || work_bytes < needed || j->number < 0 || j->number >= SRT_NUMBERS || (j->nibbles && j->n % 4 != 0))
        return -1;
    j->kernels = kernels_for(j->input);
    j->steps = up(j->tokens, j->kernels->tokens_a_step);
    j->x_chunks = up(up(j->n, GRAD_COLUMNS), UNITS_A_CHUNK);
    j->packed_x = (uint32_t *)aligned(work);
    j->packed_dy = j->packed_x + up(j->n, GRAD_COLUMNS) * GRAD_COLUMNS * j->steps;
    j->starts = (int64_t *)aligned(j->packed_x + packed_elements(j->m, j->n, j->steps));
    j->parts = (float *)aligned(j->starts + j->m + 1);
    return srt_find_starts(j->starts, j->meta, j->nibbles, j->m, j->n, threads);
}

static void multiply(job *j, int threads)
{
    if (j->tokens * j->m < 16 * SRT_SERIAL_BELOW / j->n)
        threads = 1;
    srt_parallel(threads, j->x_chunks + up(j->m, GRAD_BLOCK), run_pack, j);
    srt_parallel(threads, up(j->m, GRAD_BLOCK), run_block, j);
}

/* ---- entries ------------------------------------------------------------------------------------------------------ */

/* values [room] = (dy^T x) at the kept positions: dy [tokens, m] and x [tokens, n] of type `input`, values of type
 * `number`, sums in float32. With `add` the sums are added to what is there. Returns the number of kept positions, and
 * does nothing else where that is more than `room`; -1 for arguments that make no sense. */
EXPORT int64_t srt_values_grad(const void *dy, const void *x, int64_t tokens, const uint8_t *meta, int nibbles,
                               void *values, int64_t room, int64_t m, int64_t n, int input, int number, int add,
                               void *work, int64_t work_bytes, int threads)
{
    job j = {.dy = dy, .x = x, .meta = meta, .values = values, .m = m, .n = n, .tokens = tokens};
    j.nibbles = nibbles, j.input = input, j.number = number, j.add = add;
    int64_t kept = prepare(&j, work, work_bytes, 0, threads);
    if (kept >= 0 && kept <= room)
        multiply(&j, threads);
    return kept;
}

static void run_sum(void *context, int64_t group)
{
    const job *j = context;
    float *to = j->da + group * j->n;
    int64_t part = part_of(j, group * j->group_rows), last = part_of(j, (group + 1) * j->group_rows - 1);
    if (!j->add)
        memset(to, 0, (size_t)j->n * sizeof *to);
    for (; part <= last; part++)
        for (int64_t column = 0; column < j->n; column++)
            to[column] += j->parts[part * j->n + column];
}

/* da [groups, n] and db [m], the gradients of the factors a and b of `factors.c`: as srt_values_grad, except that the
 * `kept` values are read and the gradient of the values stays in registers. */
EXPORT int64_t srt_factors_grad(const void *dy, const void *x, int64_t tokens, const uint8_t *meta, int nibbles,
                                const void *values, int64_t kept, int64_t m, int64_t n, int input, int number,
                                const float *a, const float *b, float scale, int64_t groups, float *da, float *db,
                                int add, void *work, int64_t work_bytes, int threads)
{
    job j = {.dy = dy, .x = x, .meta = meta, .values = values, .m = m, .n = n, .tokens = tokens};
    j.nibbles = nibbles, j.input = input, j.number = number, j.add = add;
    int64_t marked = groups < 1 ? -1 : prepare(&j, work, work_bytes, groups, threads);
    if (marked < 0 || marked != kept)
        return marked;
    j.a = a, j.b = b, j.da = da, j.db = db, j.scale = scale, j.group_rows = m / groups;
    multiply(&j, threads);
    srt_parallel(groups * n < SRT_SERIAL_BELOW ? 1 : threads, groups, run_sum, &j);
    return marked;
}
