/* What the AVX-512 files share: the target, moving kept elements, and how the metadata of 64 columns becomes a mask. */
#ifndef SPARSE_RT_AVX512_H
#define SPARSE_RT_AVX512_H

#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt"
#define TARGET __attribute__((target(AVX512)))
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE int64_t popcount(uint64_t word) { return (int64_t)(uint64_t)_mm_popcnt_u64(word); }

/* Zero-masked expand and compress from a register. On Zen 4 VPEXPANDW waits for its destination register although
 * zero-masking overwrites all of it: 5.0 cycles in a chain against 1.4 when a zeroing idiom breaks it, and which one
 * the compiler produces changes with unrelated edits. So the vpxor is written down. ("x": registers 0-15, which VEX can
 * encode.) Compress is stored through a register as well: its own storing form takes about 100 cycles there. */
#define ZERO_MASKED(NAME, INSTRUCTION, MASK)                                                                           \
    INLINE __m512i NAME(MASK mask, __m512i from)                                                                       \
    {                                                                                                                  \
        __m512i to;                                                                                                    \
        __asm__("vpxor %x0, %x0, %x0\n\t" INSTRUCTION " %1, %0%{%2%}%{z%}"                                             \
                : "=&x"(to)                                                                                            \
                : "v"(from), "Yk"(mask));                                                                              \
        return to;                                                                                                     \
    }

ZERO_MASKED(expand_words, "vpexpandw", __mmask32)
ZERO_MASKED(expand_doubles, "vpexpandd", __mmask16)
ZERO_MASKED(compress_bytes, "vpcompressb", __mmask64)
ZERO_MASKED(compress_words, "vpcompressw", __mmask32)
ZERO_MASKED(compress_doubles, "vpcompressd", __mmask16)

INLINE __m512i expand_block(uint64_t mask, __m512i from, int size)
{
    return size == 2 ? expand_words((__mmask32)mask, from) : expand_doubles((__mmask16)mask, from);
}

INLINE __m512i compress_block(uint64_t mask, __m512i from, int size)
{
    return size == 2 ? compress_words((__mmask32)mask, from) : compress_doubles((__mmask16)mask, from);
}

/* The first `count` elements. What is switched off is not touched, so these may stand at the end of a page. */
INLINE __m512i load_first(const char *from, int64_t count, int size)
{
    if (size == 2)
        return _mm512_maskz_loadu_epi16((__mmask32)srt_low_bits(count), from);
    return _mm512_maskz_loadu_epi32((__mmask16)srt_low_bits(count), from);
}

INLINE void store_first(char *to, int64_t count, __m512i block, int size)
{
    if (size == 2)
        _mm512_mask_storeu_epi16(to, (__mmask32)srt_low_bits(count), block);
    else
        _mm512_mask_storeu_epi32(to, (__mmask16)srt_low_bits(count), block);
}

/* The masks of 128 columns from `bytes` <= 16 bytes of 2:4 nibbles. */
INLINE void pair_masks(uint64_t masks[2], const uint8_t *meta, int64_t bytes)
{
    /* entry i: bits (i & 3) and (i >> 2) set */
    const __m128i table = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
    const __m128i nibble = _mm_set1_epi8(15);
    __m128i pairs = _mm_maskz_loadu_epi8((__mmask16)srt_low_bits(bytes), meta);
    __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(pairs, nibble));
    __m128i second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble));
    __m128i both = _mm_or_si128(first, _mm_slli_epi16(second, 4)); /* entries < 16: no bit leaves its byte */
    masks[0] = (uint64_t)_mm_cvtsi128_si64(both);
    masks[1] = (uint64_t)_mm_extract_epi64(both, 1);
}

/* The mask of the columns [at, at + 64) of one row of metadata, at a multiple of 64, padding cleared.
 * A nibble whose two columns are equal (no valid file has one) marks one column only; callers that count on n / 2
 * values a row must not run past them. */
INLINE uint64_t mask_at(const uint8_t *meta, int pairs, int64_t at, int64_t n)
{
    if (!pairs)
        return srt_mask_word(meta, at, n);
    uint64_t masks[2];
    pair_masks(masks, meta + at / 8, srt_min((n - at + 7) / 8, 8));
    return masks[0] & srt_low_bits(n - at);
}

/* 16 x 16 dwords: rows become columns. */
INLINE void transpose(__m512i v[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) { /* v[i + c]: column c of each 4 in rows i to i + 3 */
            v[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            v[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
        t[c + 8] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        v[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
        v[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
    }
}

#endif
#endif
