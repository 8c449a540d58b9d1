/* activation.c for AVX-512: 16 elements a step. */
#include <math.h>

#include "activation.h"
#include "avx512_float.h"
#include "tiles_avx512.h"

#if defined(__x86_64__)

/* e^x = 2^n e^r with |r| <= ln(2) / 2 and the series of e^r up to r^7, whose rest is below 6e-9. Beyond +-104 the result
 * is infinity or 0; NaN stays NaN (it is the second operand). */
INLINE __m512 exponential(__m512 x)
{
    const float inverse[] = {1, 1, 1 / 2.0f, 1 / 6.0f, 1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f};
    x = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(104), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e430p-1f), x); /* ln(2) in two parts */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.05c610p-29f), r);
    __m512 sum = _mm512_set1_ps(inverse[7]);
#pragma GCC unroll 8
    for (int power = 6; power >= 0; power--)
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(inverse[power]));
    return _mm512_scalef_ps(sum, n);
}

/* x / (1 + e^-z) */
INLINE __m512 gated_by(__m512 x, __m512 minus_z)
{
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential(minus_z)));
}

/* The error function of the C library, one by one: a few percent of the time of the two products. */
INLINE __m512 gelu(__m512 x)
{
    float lanes[16];
    _mm512_storeu_ps(lanes, x);
    for (int i = 0; i < 16; i++)
        lanes[i] = 0.5f * lanes[i] * (1 + erff(lanes[i] * 0.70710678f));
    return _mm512_loadu_ps(lanes);
}

INLINE __m512 apply(int function, __m512 x)
{
    if (function == SRT_SILU)
        return gated_by(x, _mm512_sub_ps(_mm512_setzero_ps(), x));
    if (function == SRT_GELU)
        return gelu(x);
    if (function == SRT_GELU_TANH) {
        __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
        return gated_by(x, _mm512_mul_ps(_mm512_set1_ps(-1.59576912f), _mm512_fmadd_ps(cubic, x, x)));
    }
    __m512 kept = _mm512_max_ps(_mm512_setzero_ps(), x); /* NaN stays NaN */
    return _mm512_mul_ps(kept, kept);
}

INLINE __m512 rounded(__m512 values, int dtype)
{
    if (dtype == SRT_FP32)
        return values;
    if (dtype == SRT_FP16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(values)), 16));
}

INLINE void activate(int function, int dtype, char *h, const char *up, int64_t count)
{
    int64_t size = srt_number_bytes(dtype);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 lanes = (__mmask16)srt_low_bits(count - i);
        __m512 value = apply(function, load_numbers(h + i * size, lanes, dtype));
        if (up)
            value = _mm512_mul_ps(rounded(value, dtype), load_numbers(up + i * size, lanes, dtype));
        store_numbers(h + i * size, lanes, value, dtype);
    }
}

TARGET void srt_avx512_activate(int function, int dtype, char *h, const char *up, int64_t count)
{
    switch (SRT_NUMBERS * function + dtype) {
#define EACH(FUNCTION, DTYPE)                                                                                          \
    case SRT_NUMBERS * FUNCTION + DTYPE: activate(FUNCTION, DTYPE, h, up, count); break;
#define EVERY(FUNCTION) EACH(FUNCTION, SRT_BF16) EACH(FUNCTION, SRT_FP16) EACH(FUNCTION, SRT_FP32)
        EVERY(SRT_SILU) EVERY(SRT_GELU) EVERY(SRT_GELU_TANH) EVERY(SRT_RELU2)
    }
}

INLINE void add_scaled(float *sums, float scale, const char *row, int64_t count, int dtype)
{
    int64_t size = srt_number_bytes(dtype);
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 lanes = (__mmask16)srt_low_bits(count - i);
        __m512 old = _mm512_maskz_loadu_ps(lanes, sums + i), term = load_numbers(row + i * size, lanes, dtype);
        _mm512_mask_storeu_ps(sums + i, lanes, _mm512_fmadd_ps(factor, term, old));
    }
}

TARGET void srt_avx512_add_scaled(float *sums, float scale, const char *row, int64_t count, int dtype)
{
    switch (dtype) {
    case SRT_BF16: add_scaled(sums, scale, row, count, SRT_BF16); break;
    case SRT_FP16: add_scaled(sums, scale, row, count, SRT_FP16); break;
    default: add_scaled(sums, scale, row, count, SRT_FP32);
    }
}
#endif
