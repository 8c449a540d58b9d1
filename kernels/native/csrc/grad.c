/* values_grad and the gradients of factors: packs dY and X, hands blocks of rows to the tile kernels. See grad.h. */
#include "grad.h"
#include "export.h"
#include "parallel.h"
#include "starts.h"

/* Columns of x packed together: a token gives a few cache lines at a time. */
enum { PACK_COLUMNS = 512 };
enum { MAX_TOKENS = 1 << 16 };

typedef struct {
    const srt_grad *kernels;
    const char *dy, *x;
    const uint8_t *meta;
    const char *values; /* written by srt_values_grad */
    uint32_t *packed_dy, *packed_x;
    int64_t *starts; /* first value of every row */
    int64_t m, n, tokens, steps, x_chunks;
    int nibbles, input, number, add, kernel;

    const float *a, *b; /* of factors: [groups, n], [m]; NULL: the gradient itself is wanted */
    float *da, *db, *parts, scale;
    int64_t group_rows;
} job;

static int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

const char *srt_packed_isa(void); /* packed.c: the instruction set in use, where the row kernels do not tell */

/* The kernels for inputs of this type on this processor, NULL where there are none. */
static const srt_grad *kernels_for(int input, int dots)
{
#if defined(__x86_64__)
    if (srt_chosen_rows() == &srt_rows_avx512) {
        if (input == SRT_BF16 && strcmp(srt_packed_isa(), "avx512_bf16") == 0)
            return dots ? &srt_grad_dots_bf16 : &srt_grad_tiles_bf16;
        return dots ? &srt_grad_dots : &srt_grad_tiles;
    }
#endif
    (void)input, (void)dots;
    return NULL;
}

/* Whether dot products of the kept positions alone are faster than whole tiles: cycles per element of the dense
 * product, fitted on Zen 4 to 32 .. 1024 bf16 tokens at densities 0.5, 0.25 and 0.1 (2048 x 4096, one thread; dots win
 * below 0.27 for 128 tokens and below about 0.4 from 256 tokens on). */
static int dots_win(const job *j, int64_t kept)
{
    if (j->kernel)
        return j->kernel == 2;
    int64_t steps = up(j->tokens, kernels_for(j->input, 1)->tokens_a_step);
    double vectors = (double)up(steps, 16), blocks = (double)up(steps, 128);
    double density = (double)kept / (double)j->m / (double)j->n;
    return 1.2 * blocks + density * (8.5 * blocks + 1.1 * vectors) < 0.9 + 0.93 * vectors;
}

/* ---- packing, and the product ----------------------------------------------------------------------------------- */

static void run_pack(void *context, int64_t chunk)
{
    const job *j = context;
    if (chunk < j->x_chunks) {
        int64_t width = j->kernels->x_width, first = chunk * (PACK_COLUMNS / width);
        int64_t last = srt_min(first + PACK_COLUMNS / width, up(j->n, width));
        j->kernels->pack(j->x, j->input, j->tokens, j->n, width, first, last, j->packed_x);
    } else {
        int64_t width = j->kernels->dy_width, first = (chunk - j->x_chunks) * (GRAD_BLOCK / width);
        int64_t last = srt_min(first + GRAD_BLOCK / width, up(j->m, width));
        j->kernels->pack(j->dy, j->input, j->tokens, j->m, width, first, last, j->packed_dy);
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

/* ---- arguments -------------------------------------------------------------------------------------------------- */

/* Elements of both packed inputs, for the wider of the two ways to pack. */
static int64_t packed_elements(int64_t m, int64_t n, int64_t tokens, int tokens_a_step)
{
    return up(tokens, 16 * tokens_a_step) * 16 * (up(n, GRAD_COLUMNS) * GRAD_COLUMNS + up(m, GRAD_BLOCK) * GRAD_BLOCK);
}

/* Bytes of work space that srt_values_grad (groups 0) and srt_factors_grad want for this call; -1: no kernel for it
 * here, or arguments that make no sense. */
EXPORT int64_t srt_grad_bytes(int64_t m, int64_t n, int64_t tokens, int input, int64_t groups)
{
    if (m < 1 || n < 1 || tokens < 1 || m > INT32_MAX || n > INT32_MAX || tokens > MAX_TOKENS || input < 0 ||
        input >= SRT_NUMBERS || groups < 0 || (groups > 0 && m % groups != 0) || !kernels_for(input, 0))
        return -1;
    int64_t parts = groups ? up(m, GRAD_BLOCK) + groups : 0;
    return 4 * (packed_elements(m, n, tokens, kernels_for(input, 0)->tokens_a_step) + parts * n) + 8 * (m + 1) + 3 * 64;
}

static char *aligned(void *at) { return (char *)(((uintptr_t)at + 63) / 64 * 64); }

/* Fills what both entries share. Returns the number of kept positions, or -1. */
static int64_t prepare(job *j, void *work, int64_t work_bytes, int64_t groups, int threads)
{
    int64_t needed = srt_grad_bytes(j->m, j->n, j->tokens, j->input, groups);
    if (needed < 0 || work_bytes < needed || j->number < 0 || j->number >= SRT_NUMBERS || (j->nibbles && j->n % 4 != 0))
        return -1;
    j->starts = (int64_t *)aligned(work);
    j->parts = (float *)aligned(j->starts + j->m + 1);
    int64_t kept = srt_find_starts(j->starts, j->meta, j->nibbles, j->m, j->n, threads);
    j->kernels = kernels_for(j->input, dots_win(j, kept));
    j->steps = up(up(j->tokens, j->kernels->tokens_a_step), j->kernels->steps_unit) * j->kernels->steps_unit;
    j->x_chunks = up(j->n, PACK_COLUMNS);
    j->packed_x = (uint32_t *)aligned(j->parts + (groups ? up(j->m, GRAD_BLOCK) + groups : 0) * j->n);
    j->packed_dy = j->packed_x + up(j->n, j->kernels->x_width) * j->kernels->x_width * j->steps;
    return kept;
}

static void multiply(job *j, int threads)
{
    if (j->tokens * j->m < 16 * SRT_SERIAL_BELOW / j->n)
        threads = 1;
    srt_parallel(threads, j->x_chunks + up(j->m, GRAD_BLOCK), run_pack, j);
    srt_parallel(threads, up(j->m, GRAD_BLOCK), run_block, j);
}

/* ---- entries ---------------------------------------------------------------------------------------------------- */

/* values [room] = (dy^T x) at the kept positions: dy [tokens, m] and x [tokens, n] of type `input`, values of type
 * `number`, sums in float32. With `add` the sums are added to what is there. kernel: 1 tiles, 2 dots, 0 the faster one.
 * `work` has the bytes that srt_grad_bytes names. Returns the number of kept positions, and
 * does nothing else where that is more than `room`; -1 for arguments that make no sense. */
EXPORT int64_t srt_values_grad(const void *dy, const void *x, int64_t tokens, const uint8_t *meta, int nibbles,
                               void *values, int64_t room, int64_t m, int64_t n, int input, int number, int add,
                               int kernel, void *work, int64_t work_bytes, int threads)
{
    job j = {.dy = dy, .x = x, .meta = meta, .values = values, .m = m, .n = n, .tokens = tokens};
    j.nibbles = nibbles, j.input = input, j.number = number, j.add = add, j.kernel = kernel;
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
                                int add, int kernel, void *work, int64_t work_bytes, int threads)
{
    job j = {.dy = dy, .x = x, .meta = meta, .values = values, .m = m, .n = n, .tokens = tokens};
    j.nibbles = nibbles, j.input = input, j.number = number, j.add = add, j.kernel = kernel;
    int64_t marked = groups < 1 ? -1 : prepare(&j, work, work_bytes, groups, threads);
    if (marked < 0 || marked != kept)
        return marked;
    j.a = a, j.b = b, j.da = da, j.db = db, j.scale = scale, j.group_rows = m / groups;
    multiply(&j, threads);
    srt_parallel(groups * n < SRT_SERIAL_BELOW ? 1 : threads, groups, run_sum, &j);
    return marked;
}
