/* Row kernels of the native backend: one row of one weight, one instruction set.
 *
 * A weight is values + metadata. Elements are moved, never interpreted, so one kernel serves every type of its size:
 * index 0 of each pair below is for 2-byte elements (bf16, fp16), index 1 for 4-byte elements (fp32).
 *
 * Sizes and counts are in elements. `bits` is one row of the bitmask (ceil(n / 8) bytes, little bit order), `meta` one
 * row of 2:4 nibbles (ceil(n / 8) bytes, low nibble first). Padding bits behind column n are ignored.
 * No pointer needs an alignment. No kernel reads or writes outside the ranges given here.
 */
#ifndef SPARSE_RT_ROWS_H
#define SPARSE_RT_ROWS_H

#include <stdint.h>
#include <string.h>

typedef struct {
    const char *name;

    /* Whether this processor runs them. */
    int (*supported)(void);

    /* Kept columns of one row. */
    int64_t (*count)(const uint8_t *bits, int64_t n);

    /* out[n] = the row's values at their columns, zero elsewhere. `end` is the end of all values, so that whole vectors
     * can be loaded as long as more of them follow; nothing is read behind it. `stream` allows stores that bypass the
     * caches; finish() must run before another thread reads them. Returns the start of the next row's values. */
    const char *(*expand[2])(const char *values, const char *end, const uint8_t *bits, char *out, int64_t n, int stream);

    /* The inverse: values = row at the kept columns. Anything up to `end` may be overwritten, so that whole vectors can
     * be stored where later rows of the same thread follow. */
    char *(*gather[2])(const char *row, const uint8_t *bits, char *values, char *end, int64_t n);

    /* The same two for 2:4 nibbles; n is a multiple of 4 and a row has n / 2 values. */
    void (*expand24[2])(const char *values, const uint8_t *meta, char *out, int64_t n, int stream);
    void (*gather24[2])(const char *row, const uint8_t *meta, char *values, int64_t n);

    void (*finish)(void);
} srt_rows;

extern const srt_rows srt_rows_scalar;
#if defined(__x86_64__)
extern const srt_rows srt_rows_avx2, srt_rows_avx512;
#endif

/* A file of row kernels writes each of them once, as an always-inlined expand(), gather(), expand24() and gather24()
 * with the element size as last argument; this makes the functions of the table from them. */
#define SRT_ROW_KERNELS(TARGET, SIZE)                                                                                  \
    TARGET static const char *expand_##SIZE(const char *values, const char *end, const uint8_t *bits, char *out,       \
                                            int64_t n, int stream)                                                     \
    {                                                                                                                  \
        return expand(values, end, bits, out, n, stream, SIZE);                                                        \
    }                                                                                                                  \
    TARGET static char *gather_##SIZE(const char *row, const uint8_t *bits, char *values, char *end, int64_t n)        \
    {                                                                                                                  \
        return gather(row, bits, values, end, n, SIZE);                                                                \
    }                                                                                                                  \
    TARGET static void expand24_##SIZE(const char *values, const uint8_t *meta, char *out, int64_t n, int stream)      \
    {                                                                                                                  \
        expand24(values, meta, out, n, stream, SIZE);                                                                  \
    }                                                                                                                  \
    TARGET static void gather24_##SIZE(const char *row, const uint8_t *meta, char *values, int64_t n)                  \
    {                                                                                                                  \
        gather24(row, meta, values, n, SIZE);                                                                          \
    }

#define SRT_ROW_TABLE(NAME)                                                                                            \
    const srt_rows srt_rows_##NAME = {                                                                                 \
        .name = #NAME,                                                                                                 \
        .supported = supported,                                                                                        \
        .count = count,                                                                                                \
        .expand = {expand_2, expand_4},                                                                                \
        .gather = {gather_2, gather_4},                                                                                \
        .expand24 = {expand24_2, expand24_4},                                                                          \
        .gather24 = {gather24_2, gather24_4},                                                                          \
        .finish = finish,                                                                                              \
    }

/* The row kernels in use; the other files choose their kernels by them. */
const srt_rows *srt_chosen_rows(void);

/* Below this many weights a thread team costs more than it saves. */
enum { SRT_SERIAL_BELOW = 65536 };

static inline int64_t srt_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* `bytes` <= 8 bytes as a little-endian word; reads nothing behind them. */
static inline uint64_t srt_load_bytes(const uint8_t *from, int64_t bytes)
{
    uint64_t word = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int64_t i = 0; i < bytes; i++)
        word |= (uint64_t)from[i] << (8 * i);
#else
    memcpy(&word, from, (size_t)bytes);
#endif
    return word;
}

/* The lowest `count` bits set, 0 <= count. */
static inline uint64_t srt_low_bits(int64_t count)
{
    return count >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
}

/* The mask of the columns [at, at + 64) of a row of n columns, padding bits cleared. */
static inline uint64_t srt_mask_word(const uint8_t *bits, int64_t at, int64_t n)
{
    int64_t left = n - at;
    if (left >= 64)
        return srt_load_bytes(bits + at / 8, 8);
    return srt_load_bytes(bits + at / 8, (left + 7) / 8) & srt_low_bits(left);
}

#endif
