/* Weights of bytes times x rounded to bytes, for AVX-512 with VBMI2 and VNNI.
 *
 * VPDPBUSD multiplies unsigned with signed bytes, so x is stored plus 128, and 128 times the sum of the weights is
 * subtracted again: the same instruction with a constant finds it, once for all tokens. */
#include "linear.h"

#include "avx512.h"

#if defined(__x86_64__)

#define WITH_VNNI __attribute__((target(AVX512 ",avx512vnni")))
#define INLINE_VNNI WITH_VNNI static inline __attribute__((always_inline))

ZERO_MASKED(expand_bytes, "vpexpandb", __mmask64)

int srt_has_bytes_avx512(void) { return __builtin_cpu_supports("avx512vnni"); }

/* Largest absolute value of up to 256 numbers; the bits of a float grow with it, those of a NaN are above all. */
INLINE float largest(const float *x, int64_t count)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t c = 0; c < count; c += 16) {
        __mmask16 lanes = (__mmask16)srt_low_bits(srt_min(count - c, 16));
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, x + c), magnitude));
    }
    uint32_t bits = (uint32_t)_mm512_reduce_max_epi32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

TARGET void srt_round_x_avx512(const float *x, int64_t n, uint8_t *out, float *scales)
{
    for (int64_t at = 0; at < n; at += SRT_BYTE_BLOCK) {
        int64_t count = srt_min(n - at, SRT_BYTE_BLOCK);
        float most = largest(x + at, count);
        const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
        scales[at / SRT_BYTE_BLOCK] = most / 127.0f;
        for (int64_t c = at; c < at + count; c += 16) {
            __mmask16 lanes = (__mmask16)srt_low_bits(srt_min(at + count - c, 16));
            __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + c), inverse));
            rounded = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(out + c, lanes, _mm512_cvtepi32_epi8(rounded));
        }
    }
}

/* The next 64 columns of a row; moves *from. `inside`: 64 bytes may be read there. */
INLINE __m512i next_bytes(const char **from, const char *end, uint64_t mask, int inside)
{
    int64_t left = end - *from;
    __m512i packed = inside || left >= 64 ? _mm512_loadu_si512(*from)
                                          : _mm512_maskz_loadu_epi8(srt_low_bits(left), *from);
    _mm_prefetch(*from + 2048, _MM_HINT_T0);
    *from += popcount(mask);
    return expand_bytes(mask, packed);
}

/* dots [tokens] += 64 columns times the bytes of x at `bytes`; offset += 128 times their sum. */
INLINE_VNNI void add_columns(__m512i weights, const uint8_t *bytes, int64_t ld, int tokens, __m512i *dots,
                             __m512i *offset)
{
    *offset = _mm512_dpbusd_epi32(*offset, _mm512_set1_epi8((char)128), weights);
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        dots[t] = _mm512_dpbusd_epi32(dots[t], _mm512_loadu_si512(bytes + t * ld), weights);
}

INLINE_VNNI const char *row_of(const srt_weight *w, int64_t row, const char *from, int64_t at, int64_t end,
                               const srt_bytes *x, int64_t first, int tokens, int64_t step, float *sums)
{
    const uint8_t *meta = w->meta + row * srt_meta_bytes(w), *bytes = x->data + first * x->ld;
    const float *of_x = x->scales + first * x->blocks, *of_w = srt_row_scales(w, row);
    const int grouped = w->group != w->n;
    __m512 lanes[SRT_BYTE_TOKENS];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        lanes[t] = _mm512_loadu_ps(sums + t * SRT_UNIT * SRT_LANES);
    for (int64_t block = at; block < end; block += step) {
        __m512i dots[SRT_BYTE_TOKENS], offset = _mm512_setzero_si512();
#pragma GCC unroll 12
        for (int t = 0; t < tokens; t++)
            dots[t] = _mm512_setzero_si512();
        if (block + step <= w->n && w->values_end - from >= step + 64) {
#pragma GCC unroll 4
            for (int64_t c = block; c < block + step; c += 64)
                add_columns(next_bytes(&from, NULL, srt_load_bytes(meta + c / 8, 8), 1), bytes + c, x->ld, tokens,
                            dots, &offset);
        } else {
            for (int64_t c = block; c < srt_min(block + step, end); c += 64)
                add_columns(next_bytes(&from, w->values_end, srt_mask_word(meta, c, w->n), 0), bytes + c, x->ld,
                            tokens, dots, &offset);
        }
        const __m512 scale = _mm512_set1_ps(grouped ? of_w[block / step] : 1.0f);
#pragma GCC unroll 12
        for (int t = 0; t < tokens; t++) {
            __m512 found = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots[t], offset));
            if (grouped)
                found = _mm512_mul_ps(found, scale);
            lanes[t] = _mm512_fmadd_ps(found, _mm512_set1_ps(of_x[t * x->blocks + block / SRT_BYTE_BLOCK]), lanes[t]);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(sums + t * SRT_UNIT * SRT_LANES, lanes[t]);
    return from;
}

/* Columns between two conversions to float: one scale of x and one of the weight holds for them. */
INLINE_VNNI const char *row_in_steps(const srt_weight *w, int64_t row, const char *from, int64_t at, int64_t end,
                                     const srt_bytes *x, int64_t first, int tokens, float *sums)
{
    if (w->group == 64 && w->n != 64)
        return row_of(w, row, from, at, end, x, first, tokens, 64, sums);
    if (w->group == 128 && w->n != 128)
        return row_of(w, row, from, at, end, x, first, tokens, 128, sums);
    return row_of(w, row, from, at, end, x, first, tokens, SRT_BYTE_BLOCK, sums);
}

#define OF_TOKENS(T) case T: return row_in_steps(w, row, values, at, end, x, first, T, sums)
WITH_VNNI const char *srt_byte_row_avx512(const srt_weight *w, int64_t row, const char *values, int64_t at,
                                          int64_t end, const srt_bytes *x, int64_t first, int tokens, float *sums)
{
    switch (tokens) {
        OF_TOKENS(1);
        OF_TOKENS(2);
        OF_TOKENS(3);
        OF_TOKENS(4);
        OF_TOKENS(5);
        OF_TOKENS(6);
        OF_TOKENS(7);
        OF_TOKENS(8);
        OF_TOKENS(9);
        OF_TOKENS(10);
        OF_TOKENS(11);
    default: return row_in_steps(w, row, values, at, end, x, first, SRT_BYTE_TOKENS, sums);
    }
}

#endif
