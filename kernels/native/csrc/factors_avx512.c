/* Row kernels of factors.c for AVX-512: 16 columns a step, everything in float32. */
#include "avx512.h"
#include "avx512_float.h"
#include "factors.h"

#if defined(__x86_64__)

/* Columns whose factors are gathered before the values are multiplied: 4 KB in the first-level cache. */
enum { SEGMENT = 1024 };

/* The factors a[j] at the kept columns of [at, last), behind each other. Whole vectors are stored: `to` has room for 16
 * more. Returns how many there are. */
INLINE int64_t kept_factors(const srt_factor_row *row, int64_t at, int64_t last, float *to)
{
    float *from = to;
    for (; at < last; at += 64) {
        uint64_t word = mask_at(row->meta, row->nibbles, at, row->n);
        for (int64_t c = at; c < at + 64; c += 16, word >>= 16) {
            __mmask16 mask = (__mmask16)word; /* no bit behind column n, so nothing is loaded there */
            _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, row->a + c)));
            to += popcount(mask);
        }
    }
    return to - from;
}

INLINE void apply_row(const srt_factor_row *row, float base, char *out, int number, int out_number)
{
    float factors[SEGMENT + 16] __attribute__((aligned(64)));
    const char *values = row->values;
    int64_t size = srt_number_bytes(number), out_size = srt_number_bytes(out_number);
    __m512 b = _mm512_set1_ps(row->b), one = _mm512_set1_ps(base);
    for (int64_t at = 0; at < row->n; at += SEGMENT) {
        int64_t kept = kept_factors(row, at, srt_min(at + SEGMENT, row->n), factors);
        for (int64_t done = 0; done < kept; done += 16) {
            __mmask16 lanes = (__mmask16)srt_low_bits(kept - done);
            __m512 factor = _mm512_fmadd_ps(b, _mm512_load_ps(factors + done), one);
            store_numbers(out + done * out_size, lanes,
                          _mm512_mul_ps(load_numbers(values + done * size, lanes, number), factor), out_number);
        }
        values += kept * size, out += kept * out_size;
    }
}

TARGET static void apply(const srt_factor_row *row, float base, char *out, int out_number)
{
    if (row->number == SRT_BF16 && out_number == SRT_BF16) /* the usual case, without a branch a vector */
        apply_row(row, base, out, SRT_BF16, SRT_BF16);
    else
        apply_row(row, base, out, row->number, out_number);
}

const srt_factors srt_factors_avx512 = {apply};

#endif
