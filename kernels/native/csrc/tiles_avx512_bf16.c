/* Tile kernels for AVX-512 with VBMI, VBMI2 and BF16 (Zen 4, Sapphire Rapids and later), bf16 weights.
 *
 * Cycles are of a Zen 4 core, from the instruction's own loop in registers. VDPBF16PS takes 1.0, VPERMD and the dot
 * product beside each other 1.3, VPEXPANDW (1.5) and KMOVD from memory (0.5) share the dot product's units and add up:
 * 3.0 for 32 weights however few of them are kept.
 */
#include "tiles_avx512.h"

#if defined(__x86_64__)

#define TARGET                                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* ---- bitmask -------------------------------------------------------------------------------------------------- */

enum { AHEAD = 4096 }; /* bytes of values that are asked for in advance: 1.78 instead of 2.1 ms for 11008 x 4096 at 50% */

/* Values of which `bytes` are wanted. `narrow`: rarely more than half a vector, and half a vector is loaded, which
 * crosses a cache line half as often. */
INLINE __m512i load_values(const char *values, int bytes, int narrow)
{
    if (narrow && __builtin_expect(bytes <= 32, 1))
        return _mm512_castsi256_si512(_mm256_loadu_si256((const void *)values));
    return _mm512_loadu_si512(values);
}

INLINE void bitmask_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, int narrow, float *out)
{
    const uint32_t *masks = (const uint32_t *)srt_masks(w) + unit * w->stride;
    const char *values = srt_data(w) + srt_offsets(w)[unit] * 2;
    const int chains = tokens >= 4 ? 1 : 4 / tokens; /* the dot product's latency is 6: enough sums to fill it */
    __m512 sums[SRT_MAX_TOKENS + 3];
    for (int i = 0; i < tokens * chains; i++)
        sums[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < w->stride; p += 4) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        _mm_prefetch(values + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            uint32_t mask = masks[p + k];
            int bytes = 2 * _mm_popcnt_u32(mask);
            __m512i weights = srt_expand_words(mask, load_values(values, bytes, narrow));
            values += bytes;
#pragma GCC unroll 24
            for (int t = 0; t < tokens; t++) {
                int32_t pair;
                memcpy(&pair, x + ((p + k) * tokens + t) * 4, 4);
                sums[t * chains + k % chains] = dot(sums[t * chains + k % chains], weights, _mm512_set1_epi32(pair));
            }
        }
    }
    for (int t = 0; t < tokens; t++) {
        __m512 sum = sums[t * chains];
        for (int i = 1; i < chains; i++)
            sum = _mm512_add_ps(sum, sums[t * chains + i]);
        _mm512_storeu_ps(out + t * SRT_PANEL, sum);
    }
}

/* Whether 32 weights rarely keep more than 16: 1 of 40 times at 65 %, never at 75 %. One token, 8192 x 4096, one core,
 * by hand: 1.07 ms at 70 % and 1.0 at 75 %, 1.16 and 1.15 with whole vectors. */
INLINE int is_sparse(const srt_packed *w, int64_t unit)
{
    const int64_t *offsets = srt_offsets(w) + unit;
    return 20 * (offsets[1] - offsets[0]) <= 7 * 32 * w->stride;
}

TARGET static void bitmask(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    if (tokens <= 2 && is_sparse(w, unit)) { /* with more the dot products are what takes the time */
        if (tokens == 1)
            bitmask_tile(w, unit, x, 1, 1, out);
        else
            bitmask_tile(w, unit, x, 2, 1, out);
        return;
    }
#define BITMASK(T) bitmask_tile(w, unit, x, T, 0, out)
    switch (tokens) {
        SRT_TILES_TO_24(BITMASK)
    }
}

TARGET static const char *expand(const srt_packed *w, int64_t unit, int64_t first, int64_t count, const char *values,
                                 char *vectors)
{
    const uint32_t *masks = (const uint32_t *)srt_masks(w) + unit * w->stride + first;
    for (int64_t v = 0; v < count; v++) {
        _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        _mm512_store_si512(vectors + 64 * v, srt_expand_words(masks[v], _mm512_loadu_si512(values)));
        values += 2 * _mm_popcnt_u32(masks[v]);
    }
    return values;
}

INLINE void dense_tile(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead, float *out)
{
    __m512 sums[SRT_MAX_TOKENS];
#pragma GCC unroll 24
    for (int t = 0; t < tokens; t++)
        sums[t] = _mm512_loadu_ps(out + t * SRT_PANEL);
    for (int64_t v = 0; v < count; v++) {
        __m512i weights = _mm512_load_si512(vectors + 64 * v);
        const int32_t *pairs = (const int32_t *)x + v * tokens;
        if (v % 4 == 0)
            _mm_prefetch(ahead + SRT_AHEAD * v, _MM_HINT_T0);
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++)
            sums[t] = dot(sums[t], weights, _mm512_set1_epi32(pairs[t]));
    }
#pragma GCC unroll 24
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(out + t * SRT_PANEL, sums[t]);
}

TARGET static void multiply_dense(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead,
                                  float *out)
{
#define DENSE(T) dense_tile(vectors, count, x, T, ahead, out)
    switch (tokens) {
        SRT_TILES_TO_24(DENSE)
    }
}

static const srt_dense dense = {expand, multiply_dense, SRT_MAX_TOKENS, SRT_MAX_TOKENS, 1, 1};

/* ---- 2:4 ------------------------------------------------------------------------------------------------------ */

/* Entry i of the table of a group is the pair (x[i & 3], x[i >> 2]), where i is the nibble of the 2:4 format. */
INLINE __m512i pair_table(const char *x, __m512i control)
{
    int64_t quad;
    memcpy(&quad, x, 8);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(quad), control);
}

INLINE __m512i pair_control(void)
{
    char bytes[64];
    for (int i = 0; i < 16; i++) {
        bytes[4 * i] = (char)(2 * (i & 3));
        bytes[4 * i + 1] = (char)(2 * (i & 3) + 1);
        bytes[4 * i + 2] = (char)(2 * (i >> 2));
        bytes[4 * i + 3] = (char)(2 * (i >> 2) + 1);
    }
    return _mm512_loadu_si512(bytes);
}

INLINE void pairs_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    enum { R = SRT_PAIR_PANELS, BLOCK = R * 64 * (1 + SRT_PAIR_BLOCK) };
    const char *data = srt_data(w) + unit * (w->stride / SRT_PAIR_BLOCK) * BLOCK;
    const __m512i control = pair_control();
    __m512 sums[R * 4];
    for (int i = 0; i < R * tokens; i++)
        sums[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w->stride; g += SRT_PAIR_BLOCK, data += BLOCK) {
        __m512i index[R];
        for (int r = 0; r < R; r++)
            index[r] = _mm512_loadu_si512(data + 64 * r);
        for (int k = 0; k < SRT_PAIR_BLOCK; k++) {
            const char *values = data + (k + 1) * R * 64;
            __m512i kept[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                kept[r] = _mm512_loadu_si512(values + 64 * r);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                __m512i table = pair_table(x + ((g + k) * tokens + t) * 8, control);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sums[t * R + r] = dot(sums[t * R + r], kept[r], _mm512_permutexvar_epi32(index[r], table));
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                index[r] = _mm512_srli_epi32(index[r], 4);
        }
    }
    for (int i = 0; i < R * tokens; i++)
        _mm512_storeu_ps(out + i * SRT_PANEL, sums[i]);
}

TARGET static void pairs(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    switch (tokens) {
    case 1: pairs_tile(w, unit, x, 1, out); break;
    case 2: pairs_tile(w, unit, x, 2, out); break;
    case 3: pairs_tile(w, unit, x, 3, out); break;
    default: pairs_tile(w, unit, x, 4, out);
    }
}

/* ---- slots ---------------------------------------------------------------------------------------------------- */

/* The 64 low and high bytes of x in the windows of even (0) and odd (1) number. */
typedef struct {
    __m512i low[2], high[2];
} window;

INLINE void load_window(window *table, int odd, const char *x)
{
    table->low[odd] = _mm512_loadu_si512(x);
    table->high[odd] = _mm512_loadu_si512(x + 64);
}

INLINE void slot_steps(const char **data, int steps, const window *tables, int tokens, __m512 (*sums)[2])
{
    for (; steps > 0; steps--, *data += SRT_SLOT_STEP_BYTES) {
        __m512i index = _mm512_loadu_si512(*data);
        __m512i first = _mm512_loadu_si512(*data + 64), second = _mm512_loadu_si512(*data + 128);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            __m512i low = _mm512_permutex2var_epi8(tables[t].low[0], index, tables[t].low[1]);
            __m512i high = _mm512_permutex2var_epi8(tables[t].high[0], index, tables[t].high[1]);
            sums[t][0] = dot(sums[t][0], first, _mm512_unpacklo_epi8(low, high));
            sums[t][1] = dot(sums[t][1], second, _mm512_unpackhi_epi8(low, high));
        }
    }
}

INLINE void slots_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    const uint8_t *steps = (const uint8_t *)srt_masks(w) + unit * w->stride;
    const char *data = srt_data(w) + srt_offsets(w)[unit] * SRT_SLOT_STEP_BYTES;
    window tables[4];
    __m512 sums[4][2];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        sums[t][0] = sums[t][1] = _mm512_setzero_ps();
        load_window(&tables[t], 0, x + t * 128);
    }
    for (int64_t g = 0; g < w->stride; g += 2) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
            load_window(&tables[t], 1, x + ((g + 1) * tokens + t) * 128);
        slot_steps(&data, steps[g], tables, tokens, sums);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
            load_window(&tables[t], 0, x + ((g + 2) * tokens + t) * 128);
        slot_steps(&data, steps[g + 1], tables, tokens, sums);
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(out + t * SRT_PANEL, _mm512_add_ps(sums[t][0], sums[t][1]));
}

TARGET static void slots(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    switch (tokens) {
    case 1: slots_tile(w, unit, x, 1, out); break;
    case 2: slots_tile(w, unit, x, 2, out); break;
    case 3: slots_tile(w, unit, x, 3, out); break;
    default: slots_tile(w, unit, x, 4, out);
    }
}

/* ---- table ---------------------------------------------------------------------------------------------------- */

static int supported(void)
{
    return srt_tiles_avx512.supported() && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bf16");
}

const srt_tiles srt_tiles_avx512_bf16 = {
    .name = "avx512_bf16",
    .supported = supported,
    .kernels = {
        [SRT_BITMASK] = {
            [SRT_BF16] = {bitmask, SRT_X_PAIRS, SRT_MAX_TOKENS, &dense},
            [SRT_FP16] = {srt_avx512_bitmask_fp16, SRT_X_FLOAT, SRT_FMA_TOKENS, &srt_avx512_dense_fp16},
            [SRT_FP32] = {srt_avx512_bitmask_fp32, SRT_X_FLOAT, SRT_FMA_TOKENS, &srt_avx512_dense_fp32},
        },
        [SRT_PAIRS] = {[SRT_BF16] = {pairs, SRT_X_QUADS, 4}},
        [SRT_SLOTS] = {[SRT_BF16] = {slots, SRT_X_PLANES, 4}},
    },
    .store = srt_avx512_store,
    .x_pack = srt_avx512_x_pack,
    .activate = srt_avx512_activate,
    .add_scaled = srt_avx512_add_scaled,
};
#endif
