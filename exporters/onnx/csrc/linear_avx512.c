/* The product for AVX-512 with VBMI2. */
#include "linear.h"

#include "avx512_float.h"

#if defined(__x86_64__)

/* ---- few tokens: rows are expanded in registers --------------------------------------------------------------- */

/* Columns of a row that meet x at a time: with several tokens x would not stay in the first-level cache otherwise. One
 * token takes whole rows, so that values are one stream. */
enum { FEW_COLUMNS = 512, AHEAD = 2048 };

/* bf16 comes out as its even and its odd columns (two operations less than in order): x is laid out to match, 16 even
 * and 16 odd ones of every 32 columns. */
TARGET static void few_order(const float *x, int64_t ldx, int dtype, float *out)
{
    if (dtype != SRT_BF16) {
        memcpy(out, x, sizeof(float) * (size_t)ldx);
        return;
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t c = 0; c < ldx; c += 32) {
        __m512 first = _mm512_loadu_ps(x + c), second = _mm512_loadu_ps(x + c + 16);
        _mm512_storeu_ps(out + c, _mm512_permutex2var_ps(first, even, second));
        _mm512_storeu_ps(out + c + 16, _mm512_permutex2var_ps(first, odd, second));
    }
}

/* The next 32 columns of a row as two vectors of 16; moves *from. */
INLINE void next_columns(const char **from, uint32_t mask, int dtype, __m512 out[2])
{
    if (dtype == SRT_FP32) {
        uint32_t low = mask & 0xffff, high = mask >> 16;
        const char *second = *from + 4 * popcount(low);
        out[0] = _mm512_castsi512_ps(expand_doubles((__mmask16)low, _mm512_loadu_si512(*from)));
        out[1] = _mm512_castsi512_ps(expand_doubles((__mmask16)high, _mm512_loadu_si512(second)));
        *from = second + 4 * popcount(high);
        return;
    }
    __m512i words = expand_words(mask, _mm512_loadu_si512(*from));
    *from += 2 * popcount(mask);
    if (dtype == SRT_BF16) {
        out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        out[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
    } else {
        out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    }
}

/* sums [tokens][2] += columns [at, end) of a row times x. */
INLINE void few_columns(const char **from, const uint8_t *meta, int64_t at, int64_t end, int64_t n, const float *x,
                        int64_t ldx, int tokens, int dtype, int pairs, __m512 *sums)
{
    const char *values = *from;
    for (; at < end; at += 64) {
        uint64_t word = mask_at(meta, pairs, at, n);
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        if (dtype == SRT_FP32)
            _mm_prefetch(values + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 weights[2];
            next_columns(&values, (uint32_t)(word >> 32 * half), dtype, weights);
            const float *columns = x + at + 32 * half;
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                sums[2 * t] = _mm512_fmadd_ps(weights[0], _mm512_loadu_ps(columns + t * ldx), sums[2 * t]);
                sums[2 * t + 1] = _mm512_fmadd_ps(weights[1], _mm512_loadu_ps(columns + t * ldx + 16), sums[2 * t + 1]);
            }
        }
    }
    *from = values;
}

INLINE void few(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens, int dtype,
                int pairs, float *out)
{
    int64_t step = tokens == 1 ? w->n : FEW_COLUMNS;
    __m512 sums[SRT_UNIT][2 * SRT_MAX_FEW];
    const char *from[SRT_UNIT];
    for (int64_t r = 0; r < count; r++) {
        from[r] = srt_row_values(w, row + r);
        for (int i = 0; i < 2 * tokens; i++)
            sums[r][i] = _mm512_setzero_ps();
    }
    for (int64_t at = 0; at < w->n; at += step)
        for (int64_t r = 0; r < count; r++) {
            __m512 row_sums[2 * SRT_MAX_FEW];
#pragma GCC unroll 8
            for (int i = 0; i < 2 * tokens; i++)
                row_sums[i] = sums[r][i];
            few_columns(from + r, w->meta + (row + r) * srt_meta_bytes(w), at, srt_min(at + step, w->n), w->n, x, ldx,
                        tokens, dtype, pairs, row_sums);
#pragma GCC unroll 8
            for (int i = 0; i < 2 * tokens; i++)
                sums[r][i] = row_sums[i];
        }
    for (int64_t r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++)
            out[t * SRT_UNIT + r] = _mm512_reduce_add_ps(_mm512_add_ps(sums[r][2 * t], sums[r][2 * t + 1]));
}

INLINE void few_tokens(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens,
                       int dtype, int pairs, float *out)
{
    switch (tokens) {
    case 1: few(w, row, count, x, ldx, 1, dtype, pairs, out); break;
    case 2: few(w, row, count, x, ldx, 2, dtype, pairs, out); break;
    case 3: few(w, row, count, x, ldx, 3, dtype, pairs, out); break;
    default: few(w, row, count, x, ldx, 4, dtype, pairs, out);
    }
}

TARGET static void few_rows(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens,
                            float *out)
{
    int pairs = w->offsets == NULL;
    switch (2 * w->dtype + pairs) {
    case 2 * SRT_BF16: few_tokens(w, row, count, x, ldx, tokens, SRT_BF16, 0, out); break;
    case 2 * SRT_BF16 + 1: few_tokens(w, row, count, x, ldx, tokens, SRT_BF16, 1, out); break;
    case 2 * SRT_FP16: few_tokens(w, row, count, x, ldx, tokens, SRT_FP16, 0, out); break;
    case 2 * SRT_FP16 + 1: few_tokens(w, row, count, x, ldx, tokens, SRT_FP16, 1, out); break;
    case 2 * SRT_FP32: few_tokens(w, row, count, x, ldx, tokens, SRT_FP32, 0, out); break;
    default: few_tokens(w, row, count, x, ldx, tokens, SRT_FP32, 1, out);
    }
}

/* ---- more tokens: 4 rows of the panel x 6 tokens in registers ------------------------------------------------- */

enum { TILE_ROWS = 4, TILE_TOKENS = 6 };

INLINE void tile_of(const float *panel, int64_t columns, const float *x, int64_t ldx, int tokens, float *sums)
{
    __m512 lanes[TILE_TOKENS][TILE_ROWS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++)
            lanes[t][r] = _mm512_loadu_ps(sums + (t * SRT_UNIT + r) * SRT_LANES);
    for (int64_t c = 0; c < columns; c += SRT_LANES) {
        __m512 weights[TILE_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++)
            weights[r] = _mm512_loadu_ps(panel + r * SRT_PANEL_COLUMNS + c);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
            __m512 token = _mm512_loadu_ps(x + t * ldx + c);
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++)
                lanes[t][r] = _mm512_fmadd_ps(weights[r], token, lanes[t][r]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++)
            _mm512_storeu_ps(sums + (t * SRT_UNIT + r) * SRT_LANES, lanes[t][r]);
}

/* The rows of a tile stay in the first-level cache while all tokens pass. */
TARGET static void tile(const float *panel, int64_t columns, const float *x, int64_t ldx, int64_t tokens, float *sums)
{
    for (int64_t r = 0; r < SRT_UNIT; r += TILE_ROWS) {
        const float *rows = panel + r * SRT_PANEL_COLUMNS;
        for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
            const float *from = x + t * ldx;
            float *to = sums + (t * SRT_UNIT + r) * SRT_LANES;
            switch (srt_min(tokens - t, TILE_TOKENS)) {
            case 1: tile_of(rows, columns, from, ldx, 1, to); break;
            case 2: tile_of(rows, columns, from, ldx, 2, to); break;
            case 3: tile_of(rows, columns, from, ldx, 3, to); break;
            case 4: tile_of(rows, columns, from, ldx, 4, to); break;
            case 5: tile_of(rows, columns, from, ldx, 5, to); break;
            default: tile_of(rows, columns, from, ldx, 6, to);
            }
        }
    }
}

TARGET static void add_lanes(const float *sums, float *out)
{
    __m512i lanes[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        lanes[r] = _mm512_loadu_si512(sums + r * SRT_LANES);
    transpose(lanes);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < step; i++)
            lanes[i] = _mm512_castps_si512(
                _mm512_add_ps(_mm512_castsi512_ps(lanes[i]), _mm512_castsi512_ps(lanes[i + step])));
    _mm512_storeu_si512(out, lanes[0]);
}

TARGET static void widen(const void *from, int64_t count, int dtype, float *out)
{
    int64_t size = srt_number_bytes(dtype);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 lanes = (__mmask16)srt_low_bits(srt_min(count - i, 16));
        _mm512_mask_storeu_ps(out + i, lanes, load_numbers((const char *)from + i * size, lanes, dtype));
    }
}

const srt_linear srt_linear_avx512 = {
    .rows = &srt_rows_avx512,
    .few = SRT_MAX_FEW,
    .few_rows = few_rows,
    .few_order = few_order,
    .tile = tile,
    .add_lanes = add_lanes,
    .widen = widen,
};
#endif
