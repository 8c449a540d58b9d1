/* The C ABI of packed weights: plan, pack, unpack, and the product with any number of tokens. */
#include "packed.h"

#include <string.h>

#include "packed_make.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"

/* ---- instruction set ------------------------------------------------------------------------------------------ */

static const srt_tiles *const best_first[] = {
#if defined(__x86_64__)
    &srt_tiles_avx512_bf16,
    &srt_tiles_avx512,
    &srt_tiles_avx2,
#endif
    &srt_tiles_scalar,
};

static const srt_tiles *tiles = &srt_tiles_scalar;

/* Chooses the kernels by name, or with "" the best that this processor runs. 0, or -1 where there are none. */
EXPORT int srt_packed_use_isa(const char *name)
{
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if ((name[0] == '\0' || strcmp(name, best_first[i]->name) == 0) && best_first[i]->supported()) {
            tiles = best_first[i];
            return 0;
        }
    return -1;
}

EXPORT const char *srt_packed_isa(void) { return tiles->name; }

__attribute__((constructor)) static void on_load(void) { srt_packed_use_isa(""); }

/* 1 where the chosen instruction set multiplies with this layout. */
EXPORT int srt_packed_runs(int layout, int dtype)
{
    return layout >= 0 && layout < 3 && dtype >= 0 && dtype < 3 && tiles->kernels[layout][dtype].tile != NULL;
}

/* ---- pack ----------------------------------------------------------------------------------------------------- */

static srt_source source_of(const void *values, const void *meta, int nibbles, int64_t m, int64_t n, int64_t nnz,
                            int dtype)
{
    return (srt_source){.values = values, .meta = meta, .m = m, .n = n, .nnz = nnz, .nibbles = nibbles,
                        .size = srt_element_size(dtype)};
}

/* First half: counts and steps are int64 [ceil(m / 16) + 1] each, header is 128 bytes. Returns the number of elements
 * that the metadata keeps, or -1 for arguments that make no sense; the size of the packed weight is in the header. */
EXPORT int64_t srt_packed_plan(int layout, int dtype, const void *meta, int nibbles, int64_t m, int64_t n, int64_t nnz,
                               int64_t *counts, int64_t *steps, void *header, int threads)
{
    if (m < 0 || n < 0 || dtype < 0 || dtype > SRT_FP32 || layout < 0 || layout > SRT_SLOTS ||
        (layout != SRT_BITMASK && dtype != SRT_BF16) || (layout == SRT_PAIRS && !nibbles) || (nibbles && n % 4))
        return -1;
    srt_source s = source_of(NULL, meta, nibbles, m, n, nnz, dtype);
    return srt_plan(layout, dtype, &s, counts, steps, threads, header);
}

EXPORT int64_t srt_packed_bytes(const void *header) { return ((const srt_packed *)header)->bytes; }

/* Second half: out is room for the bytes that the header says; values are the nnz elements that the plan counted. */
EXPORT void srt_packed_make(const void *values, const void *meta, int nibbles, const int64_t *counts,
                            const int64_t *steps, const void *header, void *out, int threads)
{
    const srt_packed *h = header;
    srt_source s = source_of(values, meta, nibbles, h->m, h->n, h->nnz, h->dtype);
    s.starts = counts;
    srt_make(&s, steps, h, out, threads);
}

/* `packed` is a packed (m, n) weight of `bytes` bytes that the chosen instruction set can read: 1 or 0. */
static int valid(const srt_packed *w, int64_t bytes, int64_t m, int64_t n)
{
    return bytes >= (int64_t)sizeof *w && memcmp(w->magic, "srtpack", 8) == 0 && w->bytes == bytes && w->m == m &&
           w->n == n && srt_packed_runs(w->layout, w->dtype);
}

/* Layout and dtype, 16 * layout + dtype, or -1 where the block is not a packed (m, n) weight. */
EXPORT int srt_packed_kind(const void *packed, int64_t bytes, int64_t m, int64_t n)
{
    const srt_packed *w = packed;
    return valid(w, bytes, m, n) ? 16 * w->layout + w->dtype : -1;
}

/* The canonical values [nnz] and metadata [m, ceil(n / 8)] of the kind that was packed; counts is room for int64
 * [ceil(m / 16) + 1]. */
EXPORT int srt_packed_unmake(const void *packed, int64_t bytes, int64_t m, int64_t n, void *values, void *meta,
                             int64_t *counts, int threads)
{
    const srt_packed *w = packed;
    if (!valid(w, bytes, m, n))
        return -1;
    srt_source s = source_of(values, meta, (int)w->nibbles, m, n, w->nnz, w->dtype);
    srt_unmake(w, &s, counts, threads);
    return 0;
}

/* ---- linear --------------------------------------------------------------------------------------------------- */

/* The weight is read and expanded once for a part of the tokens: as many as stay in a core's share of the third-level
 * cache (512 tokens, 11008 x 4096: 218 ms with 2 MB, 227 with 1 MB, 242 with 512 KB). */
enum { WORK_BYTES = 64 << 20, X_BYTES = 4 << 20, SERIAL_BELOW = 1 << 16, CHUNKS_PER_THREAD = 16 };
enum { MAX_PART_TOKENS = 512, MAX_TILE = 64 * SRT_MAX_TOKENS, MAX_CHAINS = 2 };

typedef struct {
    const srt_packed *w;
    const char *x, *bias;
    char *y, *prepared;
    int64_t tokens, ldx, ldy, token_bytes; /* ld: elements between two tokens */
    int64_t blocks, parts, chunks;
    const srt_kernel *kernel;
    const srt_dense *dense; /* NULL: every block is multiplied for itself */
    int size;
} product;

/* Tokens are cut into blocks of nearly equal size: 64 tokens with kernels for up to 24 make 22 + 21 + 21. */
static int64_t first_token(const product *p, int64_t block) { return p->tokens * block / p->blocks; }

static void prepare_block(void *context, int64_t block)
{
    const product *p = context;
    int64_t start = first_token(p, block), stop = first_token(p, block + 1);
    tiles->x_pack(p->kernel->x, p->w->dtype, p->x + start * p->ldx * p->size, p->ldx, p->w->n, (int)(stop - start),
                  p->prepared + start * p->token_bytes);
}

/* Where the rows of a unit lie in y: `tokens` pieces that begin at `y`, the first of token `start`. */
typedef struct {
    char *y;
    const char *bias;
    int64_t rows, tokens;
    int unit_rows;
} piece;

static piece piece_of(const product *p, int64_t unit, int64_t start, int64_t stop)
{
    int unit_rows = srt_unit_rows(p->w);
    int64_t row = unit * unit_rows;
    return (piece){.y = p->y + (start * p->ldy + row) * p->size, .bias = p->bias ? p->bias + row * p->size : NULL,
                   .rows = srt_min(p->w->m - row, unit_rows), .tokens = stop - start, .unit_rows = unit_rows};
}

/* Every token of y is another cache line. Asking for them before the product saves waiting for them one by one
 * afterwards: 190 cycles a line (64 tokens, 11008 rows). */
static void expect(const product *p, const piece *to)
{
    for (int64_t t = 0; t < to->tokens; t++)
        __builtin_prefetch(to->y + t * p->ldy * p->size, 1);
}

static void store(const product *p, const piece *to, const float *out)
{
    for (int64_t t = 0; t < to->tokens; t++)
        tiles->store(out + t * to->unit_rows, to->bias, to->y + t * p->ldy * p->size, to->rows, p->w->dtype);
}

/* One unit of rows times one block of tokens, into y. */
static void multiply_unit(const product *p, int64_t unit, int64_t block)
{
    float out[MAX_TILE];
    int64_t start = first_token(p, block), stop = first_token(p, block + 1);
    piece to = piece_of(p, unit, start, stop);
    expect(p, &to);
    p->kernel->tile(p->w, unit, p->prepared + start * p->token_bytes, (int)(stop - start), out);
    store(p, &to, out);
}

static void add_chains(float *sums, int64_t tokens, int chains)
{
    for (int64_t t = 0; t < tokens && chains == 2; t++)
        for (int r = 0; r < SRT_PANEL; r++)
            sums[t * SRT_PANEL + r] = sums[2 * t * SRT_PANEL + r] + sums[(2 * t + 1) * SRT_PANEL + r];
}

/* One unit of rows times blocks [first, last): expanded once, a part of its vectors at a time. The units one by one: four
 * side by side with each part of x, so that it comes from the second-level cache, were no faster (512 tokens, fp32). */
static void multiply_expanded(const product *p, int64_t unit, int64_t first, int64_t last)
{
    _Alignas(64) char vectors[SRT_EXPANDED * SRT_VECTOR];
    float sums[MAX_PART_TOKENS * MAX_CHAINS * SRT_PANEL];
    const srt_dense *dense = p->dense;
    int64_t start = first_token(p, first), tokens = first_token(p, last) - start;
    int64_t masks = SRT_EXPANDED / dense->vectors;
    const char *values = srt_data(p->w) + srt_offsets(p->w)[unit] * p->size;
    memset(sums, 0, sizeof(float) * SRT_PANEL * (size_t)(dense->chains * tokens));
    for (int64_t mask = 0; mask < p->w->stride; mask += masks) {
        int64_t here = srt_min(p->w->stride - mask, masks), count = here * dense->vectors;
        values = dense->expand(p->w, unit, mask, here, values, vectors);
        /* The next part comes from memory while this one is multiplied, a line at a time: asked for at once it would fill
         * the queue of misses that x needs too (64 tokens, 11008 x 4096: 27.9 instead of 30.0 ms, 32.1 without). */
        const char *ahead = values; /* a vector has at most SRT_VECTOR bytes of values: later blocks ask for no more */
        for (int64_t block = first; block < last; block++) {
            int64_t at = first_token(p, block), end = first_token(p, block + 1);
            const char *x = p->prepared + at * p->token_bytes + mask * dense->vectors * (end - at) * 4;
            float *to_block = sums + (at - start) * dense->chains * SRT_PANEL;
            piece to = piece_of(p, unit, at, end);
            int finished = mask + masks >= p->w->stride;
            if (finished) /* block by block: lines of all tokens at once would push each other out of the cache */
                expect(p, &to);
            dense->tile(vectors, count, x, (int)(end - at), ahead, to_block);
            if (block - first + 1 < SRT_VECTOR / SRT_AHEAD)
                ahead += count * SRT_AHEAD;
            if (finished) {
                add_chains(to_block, end - at, dense->chains);
                store(p, &to, to_block);
            }
        }
    }
}

static void multiply_chunk(void *context, int64_t index)
{
    const product *p = context;
    int64_t part = index / p->chunks, chunk = index % p->chunks;
    int64_t first = p->w->units * chunk / p->chunks, last = p->w->units * (chunk + 1) / p->chunks;
    int64_t block = p->blocks * part / p->parts, block_end = p->blocks * (part + 1) / p->parts;
    for (int64_t unit = first; unit < last; unit++)
        if (p->dense)
            multiply_expanded(p, unit, block, block_end);
        else
            for (int64_t b = block; b < block_end; b++)
                multiply_unit(p, unit, b);
}

/* Tokens of one group: a prompt of any length needs no more room for x than one of WORK_BYTES. */
static int64_t groups_of(int64_t tokens, int64_t token_bytes)
{
    int64_t groups = srt_divide_up(tokens * token_bytes, WORK_BYTES);
    return groups < 1 ? 1 : srt_min(groups, tokens);
}

/* Bytes of work space that srt_packed_linear needs for so many tokens. */
EXPORT int64_t srt_packed_workspace(const void *packed, int64_t tokens)
{
    const srt_packed *w = packed;
    int64_t token_bytes = srt_x_token_bytes(tiles->kernels[w->layout][w->dtype].x, w->n);
    return tokens > 0 ? srt_divide_up(tokens, groups_of(tokens, token_bytes)) * token_bytes : 0;
}

static void multiply_group(product *p, int threads)
{
    p->dense = p->kernel->dense && p->tokens > p->kernel->dense->above ? p->kernel->dense : NULL;
    p->blocks = srt_divide_up(p->tokens, p->dense ? p->dense->max_tokens : p->kernel->max_tokens);
    int64_t block_tokens = srt_divide_up(p->tokens, p->blocks);
    int64_t fit = srt_min(MAX_PART_TOKENS, X_BYTES / (p->token_bytes > 0 ? p->token_bytes : 1)) / block_tokens;
    p->parts = srt_divide_up(p->blocks, fit > 1 ? fit : 1);
    if (srt_threads_for(threads) == 1 || p->w->m * p->w->n * p->tokens < SERIAL_BELOW)
        threads = 1;
    int64_t chunk_units = srt_divide_up(p->w->units, threads * CHUNKS_PER_THREAD);
    p->chunks = threads == 1 ? 1 : srt_divide_up(p->w->units, chunk_units);
    srt_parallel(p->tokens > 16 ? threads : 1, p->blocks, prepare_block, p);
    srt_parallel(threads, p->parts * p->chunks, multiply_chunk, p);
}

/* y [tokens, m] = x [tokens, n] W^T + bias, all in the dtype of the weight; ldx and ldy are elements between tokens, bias
 * may be NULL. Returns 0, or -1 where `packed` is not a packed (m, n) weight. */
EXPORT int srt_packed_linear(const void *packed, int64_t bytes, int64_t m, int64_t n, const void *x, int64_t ldx,
                             int64_t tokens, const void *bias, void *y, int64_t ldy, void *workspace, int threads)
{
    const srt_packed *w = packed;
    if (!valid(w, bytes, m, n) || tokens < 0)
        return -1;
    if (tokens == 0 || m == 0)
        return 0;
    product p = {.w = w, .bias = bias, .prepared = workspace, .ldx = ldx, .ldy = ldy, .size = srt_element_size(w->dtype)};
    p.kernel = &tiles->kernels[w->layout][w->dtype];
    p.token_bytes = srt_x_token_bytes(p.kernel->x, n);
    int64_t groups = groups_of(tokens, p.token_bytes);
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = tokens * group / groups;
        p.tokens = tokens * (group + 1) / groups - start;
        p.x = (const char *)x + start * ldx * p.size;
        p.y = (char *)y + start * ldy * p.size;
        multiply_group(&p, threads);
    }
    return 0;
}
