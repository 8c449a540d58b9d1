/* What the AVX2 files share: a table of shuffles moves the eight columns of one mask byte at a time, zeros included. */
#ifndef SPARSE_RT_AVX2_H
#define SPARSE_RT_AVX2_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

/* For every mask byte, the source lane of each of eight lanes; SRT_AVX2_ZERO where there is none. The byte table says the
 * same in bytes, as VPSHUFB wants it. */
enum { SRT_AVX2_ZERO = 0x80 };
extern uint8_t srt_expand_lanes[256][8], srt_expand_bytes[256][16];

__attribute__((target("avx2"), always_inline)) static inline __m256i srt_shuffle_words(__m128i from,
                                                                                       const uint8_t bytes[16])
{
    return _mm256_castsi128_si256(_mm_shuffle_epi8(from, _mm_loadu_si128((const void *)bytes)));
}

__attribute__((target("avx2"), always_inline)) static inline __m256i srt_shuffle_doubles(__m256i from,
                                                                                         const uint8_t lanes[8])
{
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)lanes)); /* the zero mark becomes negative */
    return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), _mm256_permutevar8x32_epi32(from, index));
}

#endif
#endif
