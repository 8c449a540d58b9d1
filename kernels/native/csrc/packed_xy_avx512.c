/* Before and after the product, for AVX-512: x in the layouts of the tile kernels, y from their sums. */
#include "avx512_float.h"
#include "packed.h"

#if defined(__x86_64__)

/* 16 pairs of bf16, or 16 elements as floats, of which `left` are there; zeros behind them. */
INLINE __m512i load_units(const char *from, int64_t left, int kind, int dtype)
{
    if (kind == SRT_X_PAIRS)
        return _mm512_maskz_loadu_epi16((__mmask32)srt_low_bits(left > 0 ? srt_min(left, 32) : 0), from);
    return _mm512_castps_si512(load_numbers(from, (__mmask16)srt_low_bits(left > 0 ? srt_min(left, 16) : 0), dtype));
}

/* 16 tokens x 16 units of 4 bytes at a time, in registers. */
INLINE void turn(const char *x, int64_t ld, int64_t n, int64_t units, int tokens, char *out, int kind, int dtype)
{
    int64_t each = kind == SRT_X_PAIRS ? 2 : 1, size = srt_element_size(dtype);
    for (int64_t u = 0; u < units; u += 16)
        for (int64_t t = 0; t < tokens; t += 16) {
            int64_t rows = srt_min(tokens - t, 16), count = srt_min(units - u, 16);
            __m512i block[16];
#pragma GCC unroll 16
            for (int64_t r = 0; r < 16; r++)
                block[r] = r < rows ? load_units(x + ((t + r) * ld + u * each) * size, n - u * each, kind, dtype)
                                    : _mm512_setzero_si512();
            transpose(block);
            for (int64_t k = 0; k < count; k++)
                _mm512_mask_storeu_epi32(out + ((u + k) * tokens + t) * 4, (__mmask16)srt_low_bits(rows), block[k]);
        }
}

TARGET void srt_avx512_x_pack(int kind, int dtype, const char *x, int64_t ld, int64_t n, int tokens, char *out)
{
    int64_t units = srt_x_token_bytes(kind, n) / 4;
    if (kind == SRT_X_PAIRS)
        turn(x, ld, n, units, tokens, out, SRT_X_PAIRS, SRT_BF16);
    else if (kind == SRT_X_FLOAT && dtype == SRT_FP32)
        turn(x, ld, n, units, tokens, out, SRT_X_FLOAT, SRT_FP32);
    else if (kind == SRT_X_FLOAT && dtype == SRT_BF16)
        turn(x, ld, n, units, tokens, out, SRT_X_FLOAT, SRT_BF16);
    else if (kind == SRT_X_FLOAT)
        turn(x, ld, n, units, tokens, out, SRT_X_FLOAT, SRT_FP16);
    else
        srt_x_pack(kind, dtype, x, ld, n, tokens, out);
}

TARGET void srt_avx512_store(const float *tile, const void *bias, void *y, int64_t rows, int dtype)
{
    int64_t size = srt_element_size(dtype);
    for (int64_t r = 0; r < rows; r += 16) {
        __mmask16 some = (__mmask16)srt_low_bits(srt_min(rows - r, 16));
        __m512 sums = _mm512_loadu_ps(tile + r);
        if (bias)
            sums = _mm512_add_ps(sums, load_numbers((const char *)bias + r * size, some, dtype));
        store_numbers((char *)y + r * size, some, sums, dtype);
    }
}
#endif
