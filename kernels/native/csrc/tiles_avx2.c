/* Tile kernels for AVX2: eight kept elements at a time are put in their lanes by a table of shuffles, widened to float and
 * multiplied by FMA. A vector of packed.h is two halves of eight rows here. */
#include <string.h>

#include "avx2.h"
#include "packed.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { AVX2_TOKENS = 6, AHEAD = 4096 };

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

/* The two halves of a column of floats. */
typedef struct {
    __m256 low, high;
} floats;

INLINE int columns_of(int dtype) { return dtype == SRT_FP32 ? 1 : 2; } /* in a vector of packed.h */

/* The columns of vector v; returns what follows its kept elements. */
INLINE const char *load_columns(const char *values, const char *masks, int64_t v, floats columns[2], int dtype)
{
    if (dtype == SRT_FP32) {
        uint32_t mask = ((const uint16_t *)masks)[v], low = mask & 0xff, high = mask >> 8;
        __m256i first = srt_shuffle_doubles(_mm256_loadu_si256((const void *)values), srt_expand_lanes[low]);
        values += 4 * _mm_popcnt_u32(low);
        __m256i second = srt_shuffle_doubles(_mm256_loadu_si256((const void *)values), srt_expand_lanes[high]);
        columns[0] = (floats){_mm256_castsi256_ps(first), _mm256_castsi256_ps(second)};
        return values + 4 * _mm_popcnt_u32(high);
    }
    uint32_t mask = ((const uint32_t *)masks)[v];
    __m256i low, high;
    values = load_half(load_half(values, mask, &low), mask >> 16, &high);
    columns[0] = (floats){column(low, 0, dtype), column(high, 0, dtype)};
    columns[1] = (floats){column(low, 1, dtype), column(high, 1, dtype)};
    return values;
}

INLINE void multiply(floats *sums, floats weights, const char *x, int64_t at, int tokens)
{
    const float *row = (const float *)x + at * tokens;
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
        __m256 broadcast = _mm256_set1_ps(row[t]);
        sums[t].low = _mm256_fmadd_ps(weights.low, broadcast, sums[t].low);
        sums[t].high = _mm256_fmadd_ps(weights.high, broadcast, sums[t].high);
    }
}

INLINE floats load_sums(const float *from) { return (floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

INLINE void store_sums(float *to, floats sums)
{
    _mm256_storeu_ps(to, sums.low);
    _mm256_storeu_ps(to + 8, sums.high);
}

INLINE void bitmask_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out, int dtype)
{
    const char *values = srt_data(w) + srt_offsets(w)[unit] * srt_element_size(dtype);
    const char *masks = srt_masks(w) + unit * w->stride * 2 * columns_of(dtype);
    floats sums[AVX2_TOKENS], columns[2];
    for (int t = 0; t < tokens; t++)
        sums[t] = (floats){_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t v = 0; v < w->stride; v++) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        values = load_columns(values, masks, v, columns, dtype);
        for (int k = 0; k < columns_of(dtype); k++)
            multiply(sums, columns[k], x, columns_of(dtype) * v + k, tokens);
    }
    for (int t = 0; t < tokens; t++)
        store_sums(out + t * SRT_PANEL, sums[t]);
}

INLINE const char *expand(const srt_packed *w, int64_t unit, int64_t first, int64_t count, const char *values,
                          char *vectors, int dtype)
{
    const char *masks = srt_masks(w) + (unit * w->stride + first) * 2 * columns_of(dtype);
    for (int64_t v = 0; v < count; v++) {
        floats columns[2];
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        values = load_columns(values, masks, v, columns, dtype);
        for (int k = 0; k < columns_of(dtype); k++)
            store_sums((float *)vectors + (columns_of(dtype) * v + k) * SRT_PANEL, columns[k]);
    }
    return values;
}

INLINE void dense_tile(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead, float *out)
{
    floats sums[AVX2_TOKENS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
        sums[t] = load_sums(out + t * SRT_PANEL);
    for (int64_t v = 0; v < count; v++) {
        if (v % 4 == 0)
            _mm_prefetch(ahead + SRT_AHEAD * v, _MM_HINT_T0);
        multiply(sums, load_sums((const float *)vectors + SRT_PANEL * v), x, v, tokens);
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
        store_sums(out + t * SRT_PANEL, sums[t]);
}

#define TOKENS(BODY)                                                                                                   \
    switch (tokens) {                                                                                                  \
    case 1: BODY(1); break;                                                                                            \
    case 2: BODY(2); break;                                                                                            \
    case 3: BODY(3); break;                                                                                            \
    case 4: BODY(4); break;                                                                                            \
    case 5: BODY(5); break;                                                                                            \
    default: BODY(6);                                                                                                  \
    }

TARGET static void dense(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead, float *out)
{
#define DENSE(T) dense_tile(vectors, count, x, T, ahead, out)
    TOKENS(DENSE)
}

#define BF16_TILE(T) bitmask_tile(w, unit, x, T, out, SRT_BF16)
#define FP16_TILE(T) bitmask_tile(w, unit, x, T, out, SRT_FP16)
#define FP32_TILE(T) bitmask_tile(w, unit, x, T, out, SRT_FP32)

#define AVX2_KERNELS(NAME, BODY, DTYPE, COLUMNS)                                                                       \
    TARGET static void bitmask_##NAME(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)        \
    {                                                                                                                  \
        TOKENS(BODY)                                                                                                   \
    }                                                                                                                  \
    TARGET static const char *expand_##NAME(const srt_packed *w, int64_t unit, int64_t first, int64_t count,           \
                                            const char *values, char *vectors)                                         \
    {                                                                                                                  \
        return expand(w, unit, first, count, values, vectors, DTYPE);                                                  \
    }                                                                                                                  \
    static const srt_dense dense_##NAME = {expand_##NAME, dense, AVX2_TOKENS, 2 * AVX2_TOKENS, COLUMNS, 1};

AVX2_KERNELS(bf16, BF16_TILE, SRT_BF16, 2)
AVX2_KERNELS(fp16, FP16_TILE, SRT_FP16, 2)
AVX2_KERNELS(fp32, FP32_TILE, SRT_FP32, 1)

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
                    [SRT_BF16] = {bitmask_bf16, SRT_X_FLOAT, AVX2_TOKENS, &dense_bf16},
                    [SRT_FP16] = {bitmask_fp16, SRT_X_FLOAT, AVX2_TOKENS, &dense_fp16},
                    [SRT_FP32] = {bitmask_fp32, SRT_X_FLOAT, AVX2_TOKENS, &dense_fp32},
                }},
    .store = srt_scalar_store,
    .x_pack = srt_x_pack,
    .activate = srt_activate,
    .add_scaled = srt_add_scaled,
};
#endif
