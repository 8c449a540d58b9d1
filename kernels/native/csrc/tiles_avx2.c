/* Tile kernels for AVX2: eight kept elements at a time are put in their lanes by a table of shuffles, widened to float and
 * multiplied by FMA. A vector of packed.h is two halves of eight rows here. */
#include <string.h>

#include "avx2.h"
#include "packed.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { AVX2_TOKENS = 4, AHEAD = 4096 };

INLINE const char *load_half(const char *values, uint32_t mask, __m256i *words)
{
    uint32_t low = mask & 0xff, high = mask >> 8 & 0xff;
    __m128i first = _mm_loadu_si128((const void *)values);
    values += 2 * _mm_popcnt_u32(low);
    __m128i second = _mm_loadu_si128((const void *)values);
    values += 2 * _mm_popcnt_u32(high);
    *words = _mm256_inserti128_si256(srt_shuffle_words(first, srt_expand_bytes[low]),
                                     _mm256_castsi256_si128(srt_shuffle_words(second, srt_expand_bytes[high])), 1);
    return values;
}

/* One of the two columns of a half of 8 rows x 2 columns. */
INLINE __m256 column(__m256i words, int second, int dtype)
{
    if (dtype == SRT_FP16) {
        __m256i one = second ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(one, one), 0x08);
        return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    }
    return _mm256_castsi256_ps(second ? _mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000))
                                      : _mm256_slli_epi32(words, 16));
}

INLINE void multiply(__m256 (*sums)[2], __m256 low, __m256 high, const char *x, int64_t at, int tokens)
{
    const float *row = (const float *)x + at * tokens;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        __m256 broadcast = _mm256_set1_ps(row[t]);
        sums[t][0] = _mm256_fmadd_ps(low, broadcast, sums[t][0]);
        sums[t][1] = _mm256_fmadd_ps(high, broadcast, sums[t][1]);
    }
}

INLINE void words_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, __m256 (*sums)[2], int dtype)
{
    const uint32_t *masks = (const uint32_t *)srt_masks(w) + unit * w->stride;
    const char *values = srt_data(w) + srt_offsets(w)[unit] * 2;
    for (int64_t p = 0; p < w->stride; p++) {
        __m256i low, high;
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        values = load_half(values, masks[p], &low);
        values = load_half(values, masks[p] >> 16, &high);
        multiply(sums, column(low, 0, dtype), column(high, 0, dtype), x, 2 * p, tokens);
        multiply(sums, column(low, 1, dtype), column(high, 1, dtype), x, 2 * p + 1, tokens);
    }
}

INLINE void floats_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, __m256 (*sums)[2])
{
    const uint16_t *masks = (const uint16_t *)srt_masks(w) + unit * w->stride;
    const char *values = srt_data(w) + srt_offsets(w)[unit] * 4;
    for (int64_t p = 0; p < w->stride; p++) {
        uint32_t low = masks[p] & 0xff, high = masks[p] >> 8;
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        __m256i first = srt_shuffle_doubles(_mm256_loadu_si256((const void *)values), srt_expand_lanes[low]);
        values += 4 * _mm_popcnt_u32(low);
        __m256i second = srt_shuffle_doubles(_mm256_loadu_si256((const void *)values), srt_expand_lanes[high]);
        values += 4 * _mm_popcnt_u32(high);
        multiply(sums, _mm256_castsi256_ps(first), _mm256_castsi256_ps(second), x, p, tokens);
    }
}

INLINE void any_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out, int dtype)
{
    __m256 sums[AVX2_TOKENS][2];
    for (int t = 0; t < tokens; t++)
        sums[t][0] = sums[t][1] = _mm256_setzero_ps();
    if (dtype == SRT_FP32)
        floats_tile(w, unit, x, tokens, sums);
    else
        words_tile(w, unit, x, tokens, sums, dtype);
    for (int t = 0; t < tokens; t++) {
        _mm256_storeu_ps(out + t * SRT_PANEL, sums[t][0]);
        _mm256_storeu_ps(out + t * SRT_PANEL + 8, sums[t][1]);
    }
}

#define AVX2_TILES(NAME, DTYPE)                                                                                        \
    TARGET static void NAME(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)                  \
    {                                                                                                                  \
        switch (tokens) {                                                                                              \
        case 1: any_tile(w, unit, x, 1, out, DTYPE); break;                                                            \
        case 2: any_tile(w, unit, x, 2, out, DTYPE); break;                                                            \
        case 3: any_tile(w, unit, x, 3, out, DTYPE); break;                                                            \
        default: any_tile(w, unit, x, 4, out, DTYPE);                                                                  \
        }                                                                                                              \
    }

AVX2_TILES(bitmask_bf16, SRT_BF16)
AVX2_TILES(bitmask_fp16, SRT_FP16)
AVX2_TILES(bitmask_fp32, SRT_FP32)

static int supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("popcnt");
}

const srt_tiles srt_tiles_avx2 = {
    .name = "avx2",
    .supported = supported,
    .kernels = {[SRT_BITMASK] = {
                    [SRT_BF16] = {bitmask_bf16, SRT_X_FLOAT, AVX2_TOKENS},
                    [SRT_FP16] = {bitmask_fp16, SRT_X_FLOAT, AVX2_TOKENS},
                    [SRT_FP32] = {bitmask_fp32, SRT_X_FLOAT, AVX2_TOKENS},
                }},
    .store = srt_scalar_store,
};
#endif
