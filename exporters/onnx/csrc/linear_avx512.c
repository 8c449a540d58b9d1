/* The product for AVX-512 with VBMI2. */
#include "linear.h"

#include "avx512_float.h"

#if defined(__x86_64__)

/* linear_avx512_bytes.c */
extern int srt_has_bytes_avx512(void);
extern void srt_round_x_avx512(const float *, int64_t, uint8_t *, float *);
extern const char *srt_byte_row_avx512(const srt_weight *, int64_t, const char *, int64_t, int64_t, const srt_bytes *,
                                       int64_t, int, float *);

/* ---- few tokens: rows are expanded in registers --------------------------------------------------------------- */

/* Several rows share what is read of x, as many as there are registers for sums. One token reads so little of it that
 * one stream of values is better (4096 x 4096 bf16, one core of Zen 4, by hand, 75 %: 0.74 ms, 1.02 with four rows; 4
 * tokens: 1.9 ms, 2.9 with one). */
enum { FEW_ROWS = 4, AHEAD = 2048 };

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

/* At every vector: one takes at most a cache line of values, so that no line is left out. */
INLINE void ahead(const char *values) { _mm_prefetch(values + AHEAD, _MM_HINT_T0); }

/* 32 numbers of two bytes as float, bf16 in the order of few_order. */
INLINE void out_of_words(__m512i words, int dtype, __m512 out[2])
{
    if (dtype == SRT_BF16) {
        out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        out[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
    } else {
        out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    }
}

/* 32 columns of a dense row, zeros where mask has none; what it lacks is not read. */
INLINE void next_dense(const char **from, uint32_t mask, int dtype, __m512 out[2])
{
    ahead(*from);
    if (dtype == SRT_FP32) {
        ahead(*from + 64);
        out[0] = _mm512_maskz_loadu_ps((__mmask16)mask, *from);
        out[1] = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), *from + 64);
        *from += 128;
        return;
    }
    out_of_words(_mm512_maskz_loadu_epi16(mask, *from), dtype, out);
    *from += 64;
}

/* The next `bytes` of values, and more. `narrow`: rarely more than half a vector, and half a vector is loaded, which
 * crosses a cache line half as often (4096 x 4096 bf16 at 75 %, by hand: 0.80 ms, 0.89 with whole ones). */
INLINE __m512i load_values(const char *from, int64_t bytes, int narrow)
{
    if (narrow && __builtin_expect(bytes <= 32, 1))
        return _mm512_castsi256_si512(_mm256_loadu_si256((const void *)from));
    return _mm512_loadu_si512(from);
}

/* The next 32 columns of a row as two vectors of 16; moves *from. */
INLINE void next_columns(const char **from, uint32_t mask, int dtype, int narrow, __m512 out[2])
{
    ahead(*from);
    if (dtype == SRT_FP32) {
        uint32_t low = mask & 0xffff, high = mask >> 16;
        int64_t first = 4 * popcount(low), second = 4 * popcount(high);
        out[0] = _mm512_castsi512_ps(expand_doubles((__mmask16)low, load_values(*from, first, narrow)));
        *from += first;
        out[1] = _mm512_castsi512_ps(expand_doubles((__mmask16)high, load_values(*from, second, narrow)));
        *from += second;
        return;
    }
    int64_t bytes = 2 * popcount(mask);
    out_of_words(expand_words(mask, load_values(*from, bytes, narrow)), dtype, out);
    *from += bytes;
}

/* out [tokens][16]: `rows` <= 4 rows from `row` on. Two sums for each row and token where there are registers for
 * them: one alone waits for itself (four are no faster). */
INLINE void few(const srt_weight *w, int64_t row, int rows, const float *x, int64_t ldx, int tokens, int dtype,
                int kind, int narrow, float *out)
{
    const int chains = rows * tokens <= 8 ? 2 : 1;
    __m512 sums[FEW_ROWS * SRT_MAX_FEW];
    const char *from[FEW_ROWS];
    const int64_t stride = srt_meta_bytes(w);
    const uint8_t *meta = kind == SRT_KEEP_ALL ? NULL : w->meta + row * stride;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        from[r] = srt_row_values(w, row + r);
#pragma GCC unroll 32
    for (int i = 0; i < rows * tokens * chains; i++)
        sums[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < w->n; at += 64) {
        uint64_t words[FEW_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            words[r] = kind == SRT_KEEP_ALL ? srt_low_bits(w->n - at)
                                         : mask_at(meta + r * stride, kind == SRT_KEEP_PAIRS, at, w->n);
        for (int half = 0; half < 2; half++) {
            const float *columns = x + at + 32 * half;
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m512 weights[2];
                uint32_t mask = (uint32_t)(words[r] >> 32 * half);
                if (kind == SRT_KEEP_ALL)
                    next_dense(&from[r], mask, dtype, weights);
                else
                    next_columns(&from[r], mask, dtype, narrow, weights);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    const float *token = columns + t * ldx;
                    __m512 *sum = sums + (r * tokens + t) * chains, *other = sum + chains - 1;
                    *sum = _mm512_fmadd_ps(weights[0], _mm512_loadu_ps(token), *sum);
                    *other = _mm512_fmadd_ps(weights[1], _mm512_loadu_ps(token + 16), *other);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            __m512 *sum = sums + (r * tokens + t) * chains;
            out[t * SRT_UNIT + r] = _mm512_reduce_add_ps(chains == 2 ? _mm512_add_ps(sum[0], sum[1]) : sum[0]);
        }
}

/* Whether half a vector rarely has too few values: 1 of 40 times for 32 columns at 65 %, for 16 columns at 70 %. */
INLINE int is_sparse(const srt_weight *w, int64_t row)
{
    return 20 * (int64_t)(w->offsets[row + 1] - w->offsets[row]) <= (w->dtype == SRT_FP32 ? 6 : 7) * w->n;
}

/* A unit is always cut alike: no thread and no other row decides how a row's sums are formed. */
INLINE void few_of(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens, int dtype,
                   int kind, float *out)
{
    const int rows = tokens == 1 ? 1 : tokens <= 6 ? FEW_ROWS : 2;
    int64_t r = 0;
    for (; r + rows <= count; r += rows)
        if (tokens == 1 && kind == SRT_KEEP_BITMASK && is_sparse(w, row + r))
            few(w, row + r, rows, x, ldx, tokens, dtype, kind, 1, out + r);
        else
            few(w, row + r, rows, x, ldx, tokens, dtype, kind, 0, out + r);
    for (; r < count; r++)
        few(w, row + r, 1, x, ldx, tokens, dtype, kind, 0, out + r);
}

#define FEW(T) few_of(w, row, count, x, ldx, T, dtype, kind, out)
INLINE void few_tokens(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens,
                       int dtype, int kind, float *out)
{
    switch (tokens) {
    case 1: FEW(1); break;
    case 2: FEW(2); break;
    case 3: FEW(3); break;
    case 4: FEW(4); break;
    case 5: FEW(5); break;
    case 6: FEW(6); break;
    case 7: FEW(7); break;
    default: FEW(8);
    }
}

#define FEW_TOKENS(DTYPE, KIND) \
    case 3 * DTYPE + KIND: few_tokens(w, row, count, x, ldx, tokens, DTYPE, KIND, out); break
TARGET static void few_rows(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens,
                            float *out)
{
    switch (3 * w->dtype + w->kind) {
        FEW_TOKENS(SRT_BF16, SRT_KEEP_BITMASK);
        FEW_TOKENS(SRT_BF16, SRT_KEEP_PAIRS);
        FEW_TOKENS(SRT_BF16, SRT_KEEP_ALL);
        FEW_TOKENS(SRT_FP16, SRT_KEEP_BITMASK);
        FEW_TOKENS(SRT_FP16, SRT_KEEP_PAIRS);
        FEW_TOKENS(SRT_FP16, SRT_KEEP_ALL);
        FEW_TOKENS(SRT_FP32, SRT_KEEP_BITMASK);
        FEW_TOKENS(SRT_FP32, SRT_KEEP_PAIRS);
        FEW_TOKENS(SRT_FP32, SRT_KEEP_ALL);
    }
}

/* ---- more tokens: 4 rows of the panel x 6 tokens in registers ------------------------------------------------- */

INLINE void tile_of(const float *panel, int64_t columns, const float *x, int64_t ldx, int tokens, float *sums,
                    const char *ahead)
{
    __m512 lanes[SRT_TILE_TOKENS][SRT_TILE_ROWS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < SRT_TILE_ROWS; r++)
            lanes[t][r] = _mm512_loadu_ps(sums + (t * SRT_UNIT + r) * SRT_LANES);
    for (int64_t c = 0; c < columns; c += SRT_LANES) {
        __m512 weights[SRT_TILE_ROWS];
        _mm_prefetch(ahead + 4 * c, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int r = 0; r < SRT_TILE_ROWS; r++)
            weights[r] = _mm512_loadu_ps(panel + r * SRT_PANEL_STRIDE + c);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
            __m512 token = _mm512_loadu_ps(x + t * ldx + c);
#pragma GCC unroll 4
            for (int r = 0; r < SRT_TILE_ROWS; r++)
                lanes[t][r] = _mm512_fmadd_ps(weights[r], token, lanes[t][r]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < SRT_TILE_ROWS; r++)
            _mm512_storeu_ps(sums + (t * SRT_UNIT + r) * SRT_LANES, lanes[t][r]);
}

TARGET static void tile(const float *panel, int64_t columns, const float *x, int64_t ldx, int tokens, float *sums,
                        const char *ahead)
{
    switch (tokens) {
    case 1: tile_of(panel, columns, x, ldx, 1, sums, ahead); break;
    case 2: tile_of(panel, columns, x, ldx, 2, sums, ahead); break;
    case 3: tile_of(panel, columns, x, ldx, 3, sums, ahead); break;
    case 4: tile_of(panel, columns, x, ldx, 4, sums, ahead); break;
    case 5: tile_of(panel, columns, x, ldx, 5, sums, ahead); break;
    default: tile_of(panel, columns, x, ldx, 6, sums, ahead);
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
    .has_bytes = srt_has_bytes_avx512,
    .round_x = srt_round_x_avx512,
    .byte_row = srt_byte_row_avx512,
};
#endif
