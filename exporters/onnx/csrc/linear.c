/* The product: x as float, units of rows shared among the caller's threads, y in its dtype. */
#include "linear.h"

#include <stdlib.h>

#include "scalar_float.h"

enum { CHUNKS = 64, X_CHUNK_TOKENS = 8, ALIGNMENT = 64, CACHE_LINE = 64 };

static const srt_linear *const best_first[] = {
#if defined(__x86_64__)
    &srt_linear_avx512,
    &srt_linear_avx2,
#endif
    &srt_linear_scalar,
};

/* Chosen anew with every session, while others may be multiplying. */
static _Atomic(const srt_linear *) linear = &srt_linear_scalar;

int srt_use_linear(const char *name)
{
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
        const srt_rows *rows = best_first[i]->rows;
        if ((name[0] == '\0' || strcmp(name, rows->name) == 0) && rows->supported()) {
            linear = best_first[i];
            return 0;
        }
    }
    return -1;
}

const srt_linear *srt_chosen_linear(void) { return linear; }

__attribute__((constructor)) static void on_load(void) { srt_use_linear(""); }

typedef struct {
    const srt_weight *w;
    const srt_linear *kernels;
    const char *x;
    char *y;
    float *natural, *ordered; /* x [tokens][ldx], the latter for few_rows only */
    srt_bytes bytes;          /* x for byte_row, or no data */
    int64_t tokens, ldx, units, chunks;
    int dtype, few;
} product;

/* ---- x -------------------------------------------------------------------------------------------------------- */

static void prepare_chunk(void *data, size_t index)
{
    const product *p = data;
    int64_t first = (int64_t)index * X_CHUNK_TOKENS, last = srt_min(first + X_CHUNK_TOKENS, p->tokens), n = p->w->n;
    for (int64_t token = first; token < last; token++) {
        float *to = p->natural + token * p->ldx;
        p->kernels->widen(p->x + token * n * srt_number_bytes(p->dtype), n, p->dtype, to);
        memset(to + n, 0, sizeof(float) * (size_t)(p->ldx - n));
        if (p->bytes.data)
            p->kernels->round_x(to, n, (uint8_t *)p->bytes.data + token * p->bytes.ld,
                                (float *)p->bytes.scales + token * p->bytes.blocks);
        if (p->few)
            p->kernels->few_order(to, p->ldx, p->w->dtype, p->ordered + token * p->ldx);
    }
}

/* ---- a unit of rows ------------------------------------------------------------------------------------------- */

/* out [columns] = those columns of a row of bytes, from column `at` on; returns where its next values are. */
static const char *expand_bytes(const product *p, int64_t row, int64_t at, int64_t columns, const char *from,
                                float *out)
{
    const srt_weight *w = p->w;
    const srt_rows *rows = p->kernels->rows;
    const uint8_t *meta = w->meta + row * srt_meta_bytes(w) + at / 8;
    const float *scales = srt_row_scales(w, row);
    int16_t words[SRT_PANEL_COLUMNS], spread[SRT_PANEL_COLUMNS];
    int64_t kept = srt_min(rows->count(meta, columns), w->values_end - from);
    for (int64_t i = 0; i < kept; i++)
        words[i] = (int8_t)from[i];
    rows->expand[0]((const char *)words, (const char *)(words + kept), meta, (char *)spread, columns, 0);
    for (int64_t c = 0; c < columns; c += w->group) {
        float scale = scales[(at + c) / w->group];
        for (int64_t i = c; i < srt_min(c + w->group, columns); i++)
            out[i] = (float)spread[i] * scale;
    }
    return from + kept;
}

/* panel [16] = `columns` columns of a unit's rows from column `at` on, zeros behind them and in rows that are not
 * there; from [16]: where the values of the rows go on. */
static void expand(const product *p, int64_t row, int64_t count, int64_t at, int64_t columns, const char **from,
                   float *panel)
{
    const srt_weight *w = p->w;
    _Alignas(ALIGNMENT) char narrow[SRT_PANEL_COLUMNS * 4];
    int wide = w->dtype == SRT_FP32;
    for (int64_t r = 0; r < SRT_UNIT; r++) {
        float *out = panel + r * SRT_PANEL_STRIDE;
        char *to = wide ? (char *)out : narrow;
        if (r >= count) {
            memset(out, 0, sizeof(float) * (size_t)(columns + SRT_LANES));
            continue;
        }
        const uint8_t *meta = w->meta ? w->meta + (row + r) * srt_meta_bytes(w) + at / 8 : NULL;
        if (w->dtype == SRT_INT8) {
            from[r] = expand_bytes(p, row + r, at, columns, from[r], out);
        } else if (w->kind == SRT_KEEP_ALL) {
            p->kernels->widen(from[r], columns, w->dtype, out);
            from[r] += columns * srt_number_bytes(w->dtype);
        } else if (w->kind == SRT_KEEP_PAIRS) {
            p->kernels->rows->expand24[wide](from[r], meta, to, columns, 0);
            from[r] += columns / 2 * srt_number_bytes(w->dtype);
        } else {
            from[r] = p->kernels->rows->expand[wide](from[r], w->values_end, meta, to, columns, 0);
        }
        if (!wide && w->kind != SRT_KEEP_ALL && w->dtype != SRT_INT8)
            p->kernels->widen(narrow, columns, w->dtype, out);
        for (int64_t c = columns; c % SRT_LANES; c++)
            out[c] = 0;
    }
}

/* y [tokens][16 rows] of one unit from sums that are already added. */
static void store(const product *p, int64_t row, int64_t count, int64_t token, const float *out)
{
    int64_t size = srt_number_bytes(p->dtype);
    char *y = p->y + (token * p->w->m + row) * size;
    for (int64_t r = 0; r < count; r++)
        srt_store_float(y + r * size, out[r], p->dtype);
}

/* Values of the unit that comes next: what is not asked for yet. While one unit is multiplied the memory would have
 * nothing to do, and the next would be expanded as slowly as it comes. */
typedef struct {
    const char *at, *end;
} stretch;

/* sums += panel [16][columns] times x [tokens]: six tokens of x meet all rows before the next come (512 tokens, by
 * hand: 173 ms, 176 the other way round, 179 where tiles end after 1024 columns). */
static void multiply_tiles(const product *p, const float *panel, int64_t columns, const float *x, int64_t tokens,
                           float *sums, stretch *next)
{
    for (int64_t t = 0; t < tokens; t += SRT_TILE_TOKENS)
        for (int64_t r = 0; r < SRT_UNIT; r += SRT_TILE_ROWS) {
            const char *ahead = next->at < next->end ? next->at : (const char *)panel;
            p->kernels->tile(panel + r * SRT_PANEL_STRIDE, columns, x + t * p->ldx, p->ldx,
                             (int)srt_min(tokens - t, SRT_TILE_TOKENS), sums + (t * SRT_UNIT + r) * SRT_LANES, ahead);
            next->at += columns / SRT_LANES * CACHE_LINE;
        }
}

static void multiply_panel(const product *p, int64_t row, int64_t count, int64_t first, int64_t last, stretch *next)
{
    _Alignas(ALIGNMENT) float panel[SRT_UNIT * SRT_PANEL_STRIDE];
    _Alignas(ALIGNMENT) float sums[SRT_BLOCK_TOKENS * SRT_UNIT * SRT_LANES];
    const char *from[SRT_UNIT];
    for (int64_t r = 0; r < count; r++)
        from[r] = srt_row_values(p->w, row + r);
    memset(sums, 0, sizeof(float) * (size_t)((last - first) * SRT_UNIT * SRT_LANES));
    for (int64_t at = 0; at < p->w->n; at += SRT_PANEL_COLUMNS) {
        int64_t columns = srt_min(p->w->n - at, SRT_PANEL_COLUMNS);
        expand(p, row, count, at, columns, from, panel);
        multiply_tiles(p, panel, srt_divide_up(columns, SRT_LANES) * SRT_LANES, p->natural + first * p->ldx + at,
                       last - first, sums, next);
    }
    for (int64_t token = first; token < last; token++) {
        float out[SRT_UNIT];
        p->kernels->add_lanes(sums + (token - first) * SRT_UNIT * SRT_LANES, out);
        store(p, row, count, token, out);
    }
}

/* Whether a vector may be loaded from every value before row `end`. Of a dense row no more is loaded than it has. */
static int has_room(const srt_weight *w, int64_t end)
{
    return w->kind == SRT_KEEP_ALL || w->values_end - srt_row_values(w, end) >= 64;
}

static void multiply_few(const product *p, int64_t row, int64_t count)
{
    float out[SRT_MAX_FEW * SRT_UNIT];
    p->kernels->few_rows(p->w, row, count, p->ordered, p->ldx, (int)p->tokens, out);
    for (int64_t token = 0; token < p->tokens; token++)
        store(p, row, count, token, out + token * SRT_UNIT);
}

/* Sums of some tokens as y; scales of whole rows are multiplied with last. */
static void finish_bytes(const product *p, int64_t row, int64_t count, int64_t first, int tokens, const float *sums)
{
    for (int t = 0; t < tokens; t++) {
        float out[SRT_UNIT];
        p->kernels->add_lanes(sums + t * SRT_UNIT * SRT_LANES, out);
        for (int64_t r = 0; r < count && p->w->group == p->w->n; r++)
            out[r] *= p->w->scales[row + r];
        store(p, row, count, first + t, out);
    }
}

/* Twelve tokens share what is expanded, and 2048 columns of them stay in the first-level cache for all rows of a unit;
 * few tokens need no such parts, and each row is read as one stream. */
static void multiply_bytes(const product *p, int64_t row, int64_t count)
{
    _Alignas(ALIGNMENT) float sums[SRT_BYTE_TOKENS * SRT_UNIT * SRT_LANES];
    for (int64_t first = 0; first < p->tokens; first += SRT_BYTE_TOKENS) {
        int tokens = (int)srt_min(p->tokens - first, SRT_BYTE_TOKENS);
        int64_t columns = tokens <= 4 ? p->w->n : SRT_BYTE_COLUMNS;
        const char *from[SRT_UNIT];
        for (int64_t r = 0; r < count; r++)
            from[r] = srt_row_values(p->w, row + r);
        memset(sums, 0, sizeof(float) * (size_t)(tokens * SRT_UNIT * SRT_LANES));
        for (int64_t at = 0; at < p->w->n; at += columns)
            for (int64_t r = 0; r < count; r++)
                from[r] = p->kernels->byte_row(p->w, row + r, from[r], at, srt_min(at + columns, p->w->n), &p->bytes,
                                               first, tokens, sums + r * SRT_LANES);
        finish_bytes(p, row, count, first, tokens, sums);
    }
}

static void multiply_chunk(void *data, size_t index)
{
    const product *p = data;
    int64_t first = p->units * (int64_t)index / p->chunks, last = p->units * ((int64_t)index + 1) / p->chunks;
    for (int64_t unit = first; unit < last; unit++) {
        int64_t row = unit * SRT_UNIT, count = srt_min(p->w->m - row, SRT_UNIT);
        if (p->bytes.data) {
            multiply_bytes(p, row, count);
            continue;
        }
        if (p->few && has_room(p->w, row + count)) {
            multiply_few(p, row, count);
            continue;
        }
        int64_t after = srt_min((unit + 1 < last ? row + 2 * SRT_UNIT : row + SRT_UNIT), p->w->m);
        stretch next = {srt_row_values(p->w, row + count), srt_row_values(p->w, after)};
        for (int64_t token = 0; token < p->tokens; token += SRT_BLOCK_TOKENS)
            multiply_panel(p, row, count, token, srt_min(token + SRT_BLOCK_TOKENS, p->tokens), &next);
    }
}

/* ---- the whole ------------------------------------------------------------------------------------------------ */

/* Room for x in every form that is needed; the caller frees natural. */
static int make_room(product *p)
{
    const srt_linear *k = p->kernels;
    int bytes = p->w->dtype == SRT_INT8 && p->w->rounds_x && k->has_bytes && k->has_bytes();
    p->few = p->w->dtype != SRT_INT8 && p->tokens <= k->few;
    p->ldx = srt_divide_up(p->w->n, SRT_X_ALIGN) * SRT_X_ALIGN + SRT_X_APART;
    p->bytes = (srt_bytes){.ld = p->ldx, .blocks = srt_divide_up(p->w->n, SRT_BYTE_BLOCK)};
    size_t floats = sizeof(float) * (size_t)(p->tokens * p->ldx);
    size_t more = p->few ? floats : bytes ? (size_t)(p->tokens * (p->bytes.ld + 4 * p->bytes.blocks)) : 0;
    size_t all = (floats + more + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    p->natural = aligned_alloc(ALIGNMENT, all);
    if (p->natural == NULL)
        return -1;
    p->ordered = p->natural + p->tokens * p->ldx;
    if (bytes) {
        p->bytes.data = (const uint8_t *)p->ordered;
        p->bytes.scales = (const float *)(p->bytes.data + p->tokens * p->bytes.ld);
    }
    return 0;
}

int srt_multiply_rows(const srt_weight *w, const void *x, int64_t tokens, void *y, int dtype, srt_spread *spread,
                      void *threads)
{
    product p = {.w = w, .kernels = srt_chosen_linear(), .x = x, .y = y, .tokens = tokens, .dtype = dtype};
    if (tokens == 0 || w->m == 0)
        return 0;
    p.units = srt_divide_up(w->m, SRT_UNIT);
    p.chunks = srt_min(p.units, CHUNKS);
    if (make_room(&p) != 0)
        return -1;
    int64_t x_chunks = srt_divide_up(tokens, X_CHUNK_TOKENS);
    int failed = 0;
    if (x_chunks == 1)
        prepare_chunk(&p, 0);
    else
        failed = spread(threads, prepare_chunk, (size_t)x_chunks, &p);
    if (!failed)
        failed = spread(threads, multiply_chunk, (size_t)p.chunks, &p);
    free(p.natural);
    return failed;
}
