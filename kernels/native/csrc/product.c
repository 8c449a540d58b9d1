/* y = x W^T + bias with packed weights: x is brought into the layout of the tile kernels, then units of rows are shared
 * among the threads. */
#include "product.h"

#include <string.h>

#include "parallel.h"
#include "rows.h"

/* The weight is read and expanded once for a part of the tokens: as many as stay in a core's share of the third-level
 * cache (512 tokens, 11008 x 4096: 218 ms with 2 MB, 227 with 1 MB, 242 with 512 KB). */
enum { WORK_BYTES = 64 << 20, X_BYTES = 4 << 20, SERIAL_BELOW = 1 << 16, CHUNKS_PER_THREAD = 16 };
enum { MAX_PART_TOKENS = 512, MAX_TILE = 64 * SRT_MAX_TOKENS, MAX_CHAINS = 2 };

/* Tokens are cut into blocks of nearly equal size: 64 tokens with kernels for up to 24 make 22 + 21 + 21. */
static int64_t first_token(const srt_product *p, int64_t block) { return p->tokens * block / p->blocks; }

static void prepare_block(const srt_product *p, int64_t block)
{
    int64_t start = first_token(p, block), stop = first_token(p, block + 1);
    if (p->fill)
        p->fill(p->context, start, stop);
    p->tiles->x_pack(p->kernel->x, p->w->dtype, p->x + start * p->ldx * p->size, p->ldx, p->w->n, (int)(stop - start),
                     p->prepared + start * p->token_bytes);
}

/* Where the rows of a unit lie in y: `tokens` pieces that begin at `y`, the first of token `start`. */
typedef struct {
    char *y;
    const char *bias;
    int64_t rows, tokens;
    int unit_rows;
} piece;

static piece piece_of(const srt_product *p, int64_t unit, int64_t start, int64_t stop)
{
    int unit_rows = srt_unit_rows(p->w);
    int64_t row = unit * unit_rows;
    return (piece){.y = p->y + (start * p->ldy + row) * p->size, .bias = p->bias ? p->bias + row * p->size : NULL,
                   .rows = srt_min(p->w->m - row, unit_rows), .tokens = stop - start, .unit_rows = unit_rows};
}

/* Every token of y is another cache line. Asking for them before the product saves waiting for them one by one
 * afterwards: 190 cycles a line (64 tokens, 11008 rows). */
static void expect(const srt_product *p, const piece *to)
{
    for (int64_t t = 0; t < to->tokens; t++)
        __builtin_prefetch(to->y + t * p->ldy * p->size, 1);
}

static void store(const srt_product *p, const piece *to, const float *out)
{
    for (int64_t t = 0; t < to->tokens; t++)
        p->tiles->store(out + t * to->unit_rows, to->bias, to->y + t * p->ldy * p->size, to->rows, p->w->dtype);
}

/* One unit of rows times one block of tokens, into y. */
static void multiply_unit(const srt_product *p, int64_t unit, int64_t block)
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
static void multiply_expanded(const srt_product *p, int64_t unit, int64_t first, int64_t last)
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

static void multiply_chunk(const srt_product *p, int64_t index)
{
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

/* The work of a list: the same number of chunks for each product, of which a smaller one leaves the last empty. */
typedef struct {
    const srt_product *products;
    int64_t each;
} list;

static void prepare_one(void *context, int64_t index)
{
    const list *all = context;
    const srt_product *p = all->products + index / all->each;
    if (index % all->each < p->blocks)
        prepare_block(p, index % all->each);
}

static void multiply_one(void *context, int64_t index)
{
    const list *all = context;
    const srt_product *p = all->products + index / all->each;
    if (index % all->each < p->parts * p->chunks)
        multiply_chunk(p, index % all->each);
}

/* How x is cut: a matter of the number of tokens alone, so that the number of threads changes no bit. */
static void plan_blocks(srt_product *p)
{
    p->tiles = srt_chosen_tiles();
    p->kernel = &p->tiles->kernels[p->w->layout][p->w->dtype];
    p->size = srt_element_size(p->w->dtype);
    p->token_bytes = srt_x_token_bytes(p->kernel->x, p->w->n);
    p->dense = p->kernel->dense && p->tokens > p->kernel->dense->above ? p->kernel->dense : NULL;
    p->blocks = srt_divide_up(p->tokens, p->dense ? p->dense->max_tokens : p->kernel->max_tokens);
    int64_t block_tokens = srt_divide_up(p->tokens, p->blocks);
    int64_t fit = srt_min(MAX_PART_TOKENS, X_BYTES / (p->token_bytes > 0 ? p->token_bytes : 1)) / block_tokens;
    p->parts = srt_divide_up(p->blocks, fit > 1 ? fit : 1);
}

static void plan_chunks(srt_product *p, int threads)
{
    int64_t chunk_units = srt_divide_up(p->w->units, threads * CHUNKS_PER_THREAD);
    p->chunks = threads == 1 ? 1 : srt_divide_up(p->w->units, chunk_units);
}

void srt_multiply(srt_product *products, int64_t count, int threads)
{
    int64_t tokens = 0, work = 0, blocks = 1, chunks = 1;
    for (int64_t i = 0; i < count; i++) {
        plan_blocks(products + i);
        tokens += products[i].tokens;
        work += products[i].w->m * products[i].w->n * products[i].tokens;
        if (products[i].blocks > blocks)
            blocks = products[i].blocks;
    }
    threads = work < SERIAL_BELOW ? 1 : srt_threads_for(threads);
    for (int64_t i = 0; i < count; i++) {
        plan_chunks(products + i, threads);
        if (products[i].parts * products[i].chunks > chunks)
            chunks = products[i].parts * products[i].chunks;
    }
    list all = {.products = products, .each = blocks};
    srt_parallel(tokens > 16 ? threads : 1, count * blocks, prepare_one, &all);
    all.each = chunks;
    srt_parallel(threads, count * chunks, multiply_one, &all);
}

/* ---- the C ABI ------------------------------------------------------------------------------------------------ */

/* Tokens of one group: a prompt of any length needs no more room for x than one of WORK_BYTES. */
static int64_t groups_of(int64_t tokens, int64_t token_bytes)
{
    int64_t groups = srt_divide_up(tokens * token_bytes, WORK_BYTES);
    return groups < 1 ? 1 : srt_min(groups, tokens);
}

static int64_t token_bytes_of(const srt_packed *w)
{
    return srt_x_token_bytes(srt_chosen_tiles()->kernels[w->layout][w->dtype].x, w->n);
}

int64_t srt_x_bytes(int dtype, int64_t n)
{
    int64_t most = 0;
    for (int layout = 0; layout <= SRT_SLOTS; layout++) {
        const srt_kernel *kernel = &srt_chosen_tiles()->kernels[layout][dtype];
        int64_t bytes = kernel->tile ? srt_x_token_bytes(kernel->x, n) : 0;
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Bytes of work space that srt_packed_linear needs for so many tokens. */
EXPORT int64_t srt_packed_workspace(const void *packed, int64_t tokens)
{
    int64_t token_bytes = token_bytes_of(packed);
    return tokens > 0 ? srt_divide_up(tokens, groups_of(tokens, token_bytes)) * token_bytes : 0;
}

/* y [tokens, m] = x [tokens, n] W^T + bias, all in the dtype of the weight; ldx and ldy are elements between tokens, bias
 * may be NULL. Returns 0, or -1 where `packed` is not a packed (m, n) weight. */
EXPORT int srt_packed_linear(const void *packed, int64_t bytes, int64_t m, int64_t n, const void *x, int64_t ldx,
                             int64_t tokens, const void *bias, void *y, int64_t ldy, void *workspace, int threads)
{
    const srt_packed *w = packed;
    if (srt_packed_kind(packed, bytes, m, n) < 0 || tokens < 0)
        return -1;
    if (tokens == 0 || m == 0)
        return 0;
    srt_product p = {.w = w, .bias = bias, .prepared = workspace, .ldx = ldx, .ldy = ldy};
    int64_t groups = groups_of(tokens, token_bytes_of(w)), size = srt_element_size(w->dtype);
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = tokens * group / groups;
        p.tokens = tokens * (group + 1) / groups - start;
        p.x = (const char *)x + start * ldx * size;
        p.y = (char *)y + start * ldy * size;
        srt_multiply(&p, 1, threads);
    }
    return 0;
}
