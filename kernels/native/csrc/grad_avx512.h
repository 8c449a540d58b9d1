/* What the AVX-512 kernels of grad.h share: how a step is read, multiplied, and what becomes of a sum.
 *
 * With AVX512-BF16 two bf16 tokens a step are multiplied and summed in float32 by VDPBF16PS (twice the rate of float32
 * products, which torch needs because its CPU GEMM cannot give a float32 result for bf16 inputs). The instruction takes
 * denormal inputs as zero. Everything else is widened to float32 when it is packed.
 */
#ifndef SPARSE_RT_GRAD_AVX512_H
#define SPARSE_RT_GRAD_AVX512_H

#include "avx512.h"
#include "avx512_float.h"
#include "grad.h"

#if defined(__x86_64__)

#define TARGET_BF16 __attribute__((target(AVX512 ",avx512bf16")))
#define PAIR_PRODUCT(sum, one, other) _mm512_dpbf16_ps(sum, (__m512bh)(one), (__m512bh)(other))
#define FLOAT_PRODUCT(sum, one, other) _mm512_fmadd_ps(_mm512_castsi512_ps(one), _mm512_castsi512_ps(other), sum)

/* srt_grad.pack, from an inlined function that is also told whether a step is a pair. */
#define DEFINE_PACKER(NAME, PACK, PAIRS)                                                                               \
    TARGET static void NAME(const char *from, int number, int64_t tokens, int64_t columns, int64_t width,              \
                            int64_t first, int64_t last, uint32_t *to)                                                 \
    {                                                                                                                  \
        PACK(from, number, tokens, columns, width, first, last, to, PAIRS);                                            \
    }

INLINE __m512i load_words(const char *from, __mmask16 lanes)
{
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
}

/* 16 lanes of one step: a pair of bf16 of the tokens at `at` and `next` (NULL: none), or one token as float32. */
INLINE __m512i step_lanes(const char *at, const char *next, int number, __mmask16 lanes, int pairs)
{
    if (pairs) {
        __m512i second = next ? load_words(next, lanes) : _mm512_setzero_si512();
        return _mm512_or_si512(load_words(at, lanes), _mm512_slli_epi32(second, 16));
    }
    return _mm512_castps_si512(load_numbers(at, lanes, number));
}

/* Writes the kept ones of 16 sums behind each other. Returns where the next ones go. */
INLINE char *keep(char *to, __mmask16 mask, __m512 sums, int number, int add)
{
    int64_t kept = popcount(mask);
    __mmask16 lanes = (__mmask16)srt_low_bits(kept);
    sums = _mm512_maskz_compress_ps(mask, sums);
    if (add)
        sums = _mm512_add_ps(sums, load_numbers(to, lanes, number));
    store_numbers(to, lanes, sums, number);
    return to + kept * srt_number_bytes(number);
}

/* What the factors need of 16 columns from `at` on: adds to da, returns G w a. What is not kept may be NaN in `sums`,
 * and the mask has no bit behind column n, so nothing is touched there. */
INLINE __m512 reduce(const srt_grad_block *b, int64_t row, int64_t at, __mmask16 mask, __m512 sums, const char *values,
                     int number)
{
    __m512 w = load_numbers(values, (__mmask16)srt_low_bits(popcount(mask)), number);
    __m512 product = _mm512_maskz_mul_ps(mask, _mm512_maskz_expand_ps(mask, w), sums);
    float *da = b->da[row] + at;
    __m512 factor = _mm512_set1_ps(b->scale * b->b[row]);
    _mm512_mask_storeu_ps(da, mask, _mm512_fmadd_ps(product, factor, _mm512_maskz_loadu_ps(mask, da)));
    return _mm512_mul_ps(product, _mm512_maskz_loadu_ps(mask, b->a[row] + at));
}

/* The 64 columns from `at` on of one row: `word` says which of the `sums` are kept. Moves *values, and adds to the 16
 * parts of db. */
INLINE void finish_word(const srt_grad_block *b, int64_t row, int64_t at, uint64_t word, const float *sums,
                        const char **values, float *db)
{
    __m512 total = _mm512_load_ps(db);
    for (; word; word >>= 16, at += 16, sums += 16) {
        __mmask16 mask = (__mmask16)word;
        __m512 sum = _mm512_load_ps(sums);
        if (b->a) {
            total = _mm512_add_ps(total, reduce(b, row, at, mask, sum, *values, b->number));
            *values += popcount(mask) * srt_number_bytes(b->number);
        } else {
            *values = keep((char *)*values, mask, sum, b->number, b->add);
        }
    }
    _mm512_store_ps(db, total);
}

INLINE void finish_db(const srt_grad_block *b, const float *parts)
{
    for (int64_t row = 0; b->a && row < b->rows; row++)
        b->db[row] = (b->add ? b->db[row] : 0) + b->scale * _mm512_reduce_add_ps(_mm512_load_ps(parts + 16 * row));
}

#endif
#endif
