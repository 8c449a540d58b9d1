/* Tile kernels for AVX-512 with VBMI2 but without BF16 (Ice Lake), and of fp16 and fp32 weights everywhere: the kept
 * elements are expanded, widened to float and multiplied by FMA. */
#include "tiles_avx512.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,bmi2,popcnt,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { AHEAD = 4096 };

/* Widens one of the two columns of a vector of 16 x 2. */
INLINE __m512 column(__m512i words, int second, int dtype)
{
    if (dtype == SRT_FP16)
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(second ? _mm512_srli_epi32(words, 16) : words));
    return _mm512_castsi512_ps(second ? _mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000))
                                      : _mm512_slli_epi32(words, 16));
}

INLINE void multiply(__m512 *sums, __m512 weights, const char *x, int64_t at, int tokens)
{
    const float *row = (const float *)x + at * tokens;
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        sums[t] = _mm512_fmadd_ps(weights, _mm512_set1_ps(row[t]), sums[t]);
}

INLINE void finish_tile(__m512 (*sums)[SRT_FMA_TOKENS], int tokens, float *out)
{
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(out + t * SRT_PANEL, _mm512_add_ps(sums[0][t], sums[1][t]));
}

INLINE void words_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out, int dtype)
{
    const uint32_t *masks = (const uint32_t *)srt_masks(w) + unit * w->stride;
    const char *values = srt_data(w) + srt_offsets(w)[unit] * 2;
    __m512 sums[2][SRT_FMA_TOKENS];
    for (int t = 0; t < tokens; t++)
        sums[0][t] = sums[1][t] = _mm512_setzero_ps();
    for (int64_t p = 0; p < w->stride; p++) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        __m512i words = srt_expand_words(masks[p], _mm512_loadu_si512(values));
        values += 2 * _mm_popcnt_u32(masks[p]);
        multiply(sums[0], column(words, 0, dtype), x, 2 * p, tokens);
        multiply(sums[1], column(words, 1, dtype), x, 2 * p + 1, tokens);
    }
    finish_tile(sums, tokens, out);
}

INLINE void floats_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    const uint16_t *masks = (const uint16_t *)srt_masks(w) + unit * w->stride;
    const char *values = srt_data(w) + srt_offsets(w)[unit] * 4;
    __m512 sums[2][SRT_FMA_TOKENS];
    for (int t = 0; t < tokens; t++)
        sums[0][t] = sums[1][t] = _mm512_setzero_ps();
    for (int64_t p = 0; p < w->stride; p += 2)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            _mm_prefetch(values + AHEAD, _MM_HINT_T0);
            uint16_t mask = masks[p + k];
            __m512i words = srt_expand_doubles(mask, _mm512_loadu_si512(values));
            values += 4 * _mm_popcnt_u32(mask);
            multiply(sums[k], _mm512_castsi512_ps(words), x, p + k, tokens);
        }
    finish_tile(sums, tokens, out);
}

#define BF16_TILE(T) words_tile(w, unit, x, T, out, SRT_BF16)
#define FP16_TILE(T) words_tile(w, unit, x, T, out, SRT_FP16)
#define FP32_TILE(T) floats_tile(w, unit, x, T, out)

#define FMA_TILES(NAME, BODY)                                                                                          \
    TARGET void NAME(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)                         \
    {                                                                                                                  \
        switch (tokens) {                                                                                              \
            SRT_TILES_TO_12(BODY)                                                                                      \
        }                                                                                                              \
    }

FMA_TILES(srt_avx512_bitmask_bf16, BF16_TILE)
FMA_TILES(srt_avx512_bitmask_fp16, FP16_TILE)
FMA_TILES(srt_avx512_bitmask_fp32, FP32_TILE)

INLINE const char *expand_words(const srt_packed *w, int64_t unit, int64_t first, int64_t count, const char *values,
                                char *vectors, int dtype)
{
    const uint32_t *masks = (const uint32_t *)srt_masks(w) + unit * w->stride + first;
    for (int64_t v = 0; v < count; v++) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        __m512i words = srt_expand_words(masks[v], _mm512_loadu_si512(values));
        _mm512_store_ps(vectors + 2 * SRT_VECTOR * v, column(words, 0, dtype));
        _mm512_store_ps(vectors + 2 * SRT_VECTOR * v + SRT_VECTOR, column(words, 1, dtype));
        values += 2 * _mm_popcnt_u32(masks[v]);
    }
    return values;
}

TARGET static const char *expand_floats(const srt_packed *w, int64_t unit, int64_t first, int64_t count,
                                        const char *values, char *vectors)
{
    const uint16_t *masks = (const uint16_t *)srt_masks(w) + unit * w->stride + first;
    for (int64_t v = 0; v < count; v++) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        _mm512_store_si512(vectors + SRT_VECTOR * v, srt_expand_doubles(masks[v], _mm512_loadu_si512(values)));
        values += 4 * _mm_popcnt_u32(masks[v]);
    }
    return values;
}

#define EXPAND_WORDS(NAME, DTYPE)                                                                                      \
    TARGET static const char *NAME(const srt_packed *w, int64_t unit, int64_t first, int64_t count,                    \
                                   const char *values, char *vectors)                                                  \
    {                                                                                                                  \
        return expand_words(w, unit, first, count, values, vectors, DTYPE);                                            \
    }

EXPAND_WORDS(expand_bf16, SRT_BF16)
EXPAND_WORDS(expand_fp16, SRT_FP16)

/* The chain of the even columns first, then that of the odd ones: both at once are 48 registers for 24 tokens. */
INLINE void dense_tile(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead, float *sums)
{
    for (int64_t chain = 0; chain < 2; chain++) {
        __m512 chains[SRT_MAX_TOKENS];
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++)
            chains[t] = _mm512_loadu_ps(sums + (2 * t + chain) * SRT_PANEL);
        for (int64_t v = chain; v < count; v += 2) {
            const float *row = (const float *)x + v * tokens;
            __m512 weights = _mm512_load_ps(vectors + SRT_VECTOR * v);
            if (v % 4 == 0)
                _mm_prefetch(ahead + SRT_AHEAD * v, _MM_HINT_T0);
#pragma GCC unroll 24
            for (int t = 0; t < tokens; t++)
                chains[t] = _mm512_fmadd_ps(weights, _mm512_set1_ps(row[t]), chains[t]);
        }
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(sums + (2 * t + chain) * SRT_PANEL, chains[t]);
    }
}

TARGET static void dense(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead, float *sums)
{
#define DENSE(T) dense_tile(vectors, count, x, T, ahead, sums)
    switch (tokens) {
        SRT_TILES_TO_24(DENSE)
    }
}

const srt_dense srt_avx512_dense_bf16 = {expand_bf16, dense, SRT_MAX_TOKENS, SRT_MAX_TOKENS, 2, 2};
const srt_dense srt_avx512_dense_fp16 = {expand_fp16, dense, SRT_MAX_TOKENS, SRT_MAX_TOKENS, 2, 2};
const srt_dense srt_avx512_dense_fp32 = {expand_floats, dense, SRT_MAX_TOKENS, SRT_MAX_TOKENS, 1, 2};

static int supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
}

const srt_tiles srt_tiles_avx512 = {
    .name = "avx512",
    .supported = supported,
    .kernels = {[SRT_BITMASK] = {
                    [SRT_BF16] = {srt_avx512_bitmask_bf16, SRT_X_FLOAT, SRT_FMA_TOKENS, &srt_avx512_dense_bf16},
                    [SRT_FP16] = {srt_avx512_bitmask_fp16, SRT_X_FLOAT, SRT_FMA_TOKENS, &srt_avx512_dense_fp16},
                    [SRT_FP32] = {srt_avx512_bitmask_fp32, SRT_X_FLOAT, SRT_FMA_TOKENS, &srt_avx512_dense_fp32},
                }},
    .store = srt_avx512_store,
    .x_pack = srt_avx512_x_pack,
    .activate = srt_avx512_activate,
    .add_scaled = srt_avx512_add_scaled,
};
#endif
