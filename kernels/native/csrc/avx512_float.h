/* 16 numbers of a type as float32 and back. Lanes that are switched off are neither read nor written. */
#ifndef SPARSE_RT_AVX512_FLOAT_H
#define SPARSE_RT_AVX512_FLOAT_H

#include "avx512.h"
#include "numbers.h"

#if defined(__x86_64__)

INLINE __m512 load_numbers(const char *from, __mmask16 lanes, int number)
{
    if (number == SRT_FP32)
        return _mm512_maskz_loadu_ps(lanes, from);
    __m256i narrow = _mm256_maskz_loadu_epi16(lanes, from);
    if (number == SRT_FP16)
        return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

/* Round to nearest, ties to even; NaN stays NaN. Not VCVTNEPS2BF16, which needs AVX512-BF16 and drops denormals. */
INLINE __m256i to_bf16(__m512 values)
{
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void store_numbers(char *to, __mmask16 lanes, __m512 values, int number)
{
    if (number == SRT_FP32)
        _mm512_mask_storeu_ps(to, lanes, values);
    else
        _mm256_mask_storeu_epi16(to, lanes, number == SRT_BF16 ? to_bf16(values)
                                                               : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

#endif
#endif
