/* Row kernels for AVX2: a table of shuffles moves the eight columns of one mask byte at a time, zeros included.
 *
 * As in avx512.c each function names its own target. What does not fill whole steps goes to the portable kernels.
 */
#include "avx2.h"
#include "rows.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* The tables of avx2.h, and the same for compressing. */
enum { ZERO = SRT_AVX2_ZERO };
uint8_t srt_expand_lanes[256][8], srt_expand_bytes[256][16];
static uint8_t compress_lanes[256][8], compress_bytes[256][16];
static uint8_t pair_mask[256]; /* a byte of two 2:4 nibbles as the mask of its eight columns */

static void to_bytes(uint8_t bytes[16], const uint8_t lanes[8])
{
    for (int lane = 0; lane < 8; lane++) {
        bytes[2 * lane] = lanes[lane] == ZERO ? ZERO : (uint8_t)(2 * lanes[lane]);
        bytes[2 * lane + 1] = lanes[lane] == ZERO ? ZERO : (uint8_t)(2 * lanes[lane] + 1);
    }
}

__attribute__((constructor)) static void fill_tables(void)
{
    for (int mask = 0; mask < 256; mask++) {
        uint8_t kept = 0;
        memset(compress_lanes[mask], ZERO, 8);
        for (uint8_t lane = 0; lane < 8; lane++) {
            srt_expand_lanes[mask][lane] = mask >> lane & 1 ? kept : ZERO;
            if (mask >> lane & 1)
                compress_lanes[mask][kept++] = lane;
        }
        to_bytes(srt_expand_bytes[mask], srt_expand_lanes[mask]);
        to_bytes(compress_bytes[mask], compress_lanes[mask]);
        int low = 1 << (mask & 3) | 1 << (mask >> 2 & 3), high = 1 << (mask >> 4 & 3) | 1 << (mask >> 6 & 3);
        pair_mask[mask] = (uint8_t)(low | high << 4);
    }
}

/* Eight elements: 16 bytes of 2-byte elements in the lower half, 32 bytes of 4-byte elements. */
INLINE __m256i load_eight(const char *from, int size)
{
    return size == 2 ? _mm256_castsi128_si256(_mm_loadu_si128((const void *)from))
                     : _mm256_loadu_si256((const void *)from);
}

INLINE __m256i load_four(const char *from, int size)
{
    return _mm256_castsi128_si256(size == 2 ? _mm_loadl_epi64((const void *)from)
                                            : _mm_loadu_si128((const void *)from));
}

INLINE void store_eight(char *to, __m256i eight, int stream, int size)
{
    if (size == 2 && stream)
        _mm_stream_si128((void *)to, _mm256_castsi256_si128(eight));
    else if (size == 2)
        _mm_storeu_si128((void *)to, _mm256_castsi256_si128(eight));
    else if (stream)
        _mm256_stream_si256((void *)to, eight);
    else
        _mm256_storeu_si256((void *)to, eight);
}

INLINE __m256i expand_eight(int mask, __m256i from, int size)
{
    return size == 2 ? srt_shuffle_words(_mm256_castsi256_si128(from), srt_expand_bytes[mask])
                     : srt_shuffle_doubles(from, srt_expand_lanes[mask]);
}

INLINE __m256i compress_eight(int mask, __m256i from, int size)
{
    return size == 2 ? srt_shuffle_words(_mm256_castsi256_si128(from), compress_bytes[mask])
                     : srt_shuffle_doubles(from, compress_lanes[mask]);
}

TARGET static int64_t count(const uint8_t *bits, int64_t n)
{
    int64_t kept = 0;
    for (int64_t at = 0; at < n; at += 64)
        kept += (int64_t)_mm_popcnt_u64(srt_mask_word(bits, at, n));
    return kept;
}

INLINE int64_t expand_whole(const char **values, const char *end, const uint8_t *bits, char *out, int64_t n, int stream,
                            int size)
{
    const char *from = *values;
    int64_t at = 0;
    for (; at + 8 <= n && end - from >= 8 * size; at += 8) {
        int mask = bits[at / 8];
        store_eight(out + at * size, expand_eight(mask, load_eight(from, size), size), stream, size);
        from += _mm_popcnt_u32((unsigned)mask) * size;
    }
    *values = from;
    return at;
}

INLINE const char *expand(const char *values, const char *end, const uint8_t *bits, char *out, int64_t n, int stream,
                          int size)
{
    int64_t at = stream && (uintptr_t)out % 32 == 0 ? expand_whole(&values, end, bits, out, n, 1, size)
                                                    : expand_whole(&values, end, bits, out, n, 0, size);
    return srt_rows_scalar.expand[size == 4](values, end, bits + at / 8, out + at * size, n - at, 0);
}

INLINE char *gather(const char *row, const uint8_t *bits, char *values, char *end, int64_t n, int size)
{
    int64_t at = 0;
    for (; at + 8 <= n && end - values >= 8 * size; at += 8) {
        int mask = bits[at / 8];
        store_eight(values, compress_eight(mask, load_eight(row + at * size, size), size), 0, size);
        values += _mm_popcnt_u32((unsigned)mask) * size;
    }
    return srt_rows_scalar.gather[size == 4](row + at * size, bits + at / 8, values, end, n - at);
}

INLINE int64_t expand24_whole(const char *values, const uint8_t *meta, char *out, int64_t n, int stream, int size)
{
    int64_t at = 0;
    for (; at + 8 <= n; at += 8, values += 4 * size)
        store_eight(out + at * size, expand_eight(pair_mask[meta[at / 8]], load_four(values, size), size), stream, size);
    return at;
}

INLINE void expand24(const char *values, const uint8_t *meta, char *out, int64_t n, int stream, int size)
{
    int64_t at = stream && (uintptr_t)out % 32 == 0 ? expand24_whole(values, meta, out, n, 1, size)
                                                    : expand24_whole(values, meta, out, n, 0, size);
    srt_rows_scalar.expand24[size == 4](values + at / 2 * size, meta + at / 8, out + at * size, n - at, 0);
}

INLINE void gather24(const char *row, const uint8_t *meta, char *values, int64_t n, int size)
{
    int64_t at = 0;
    for (; at + 8 <= n; at += 8, values += 4 * size) {
        __m256i four = compress_eight(pair_mask[meta[at / 8]], load_eight(row + at * size, size), size);
        if (size == 2)
            _mm_storel_epi64((void *)values, _mm256_castsi256_si128(four));
        else
            _mm_storeu_si128((void *)values, _mm256_castsi256_si128(four));
    }
    srt_rows_scalar.gather24[size == 4](row + at * size, meta + at / 8, values, n - at);
}

static void finish(void) { _mm_sfence(); }

static int supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
}

SRT_ROW_KERNELS(TARGET, 2)
SRT_ROW_KERNELS(TARGET, 4)
SRT_ROW_TABLE(avx2);

#endif
