/* Portable row kernels: any compiler, any processor. They walk the set bits, so their time falls with the density. */
#include "rows.h"

#define INLINE static inline __attribute__((always_inline))

static int64_t count(const uint8_t *bits, int64_t n)
{
    int64_t kept = 0;
    for (int64_t at = 0; at < n; at += 64)
        kept += __builtin_popcountll(srt_mask_word(bits, at, n));
    return kept;
}

INLINE const char *expand(const char *values, const char *end, const uint8_t *bits, char *out, int64_t n, int stream,
                          int size)
{
    (void)stream;
    memset(out, 0, (size_t)(n * size));
    for (int64_t at = 0; at < n; at += 64)
        for (uint64_t word = srt_mask_word(bits, at, n); word && values < end; word &= word - 1, values += size)
            memcpy(out + (at + __builtin_ctzll(word)) * size, values, (size_t)size);
    return values;
}

INLINE char *gather(const char *row, const uint8_t *bits, char *values, char *end, int64_t n, int size)
{
    for (int64_t at = 0; at < n; at += 64)
        for (uint64_t word = srt_mask_word(bits, at, n); word && values < end; word &= word - 1, values += size)
            memcpy(values, row + (at + __builtin_ctzll(word)) * size, (size_t)size);
    return values;
}

/* The nibble of the group that starts at column `at`: first kept column in bits 0-1, second in bits 2-3. */
INLINE int nibble_at(const uint8_t *meta, int64_t at) { return meta[at / 8] >> (at % 8); }

INLINE void expand24(const char *values, const uint8_t *meta, char *out, int64_t n, int stream, int size)
{
    (void)stream;
    memset(out, 0, (size_t)(n * size));
    for (int64_t at = 0; at < n; at += 4, values += 2 * size, out += 4 * size) {
        int nibble = nibble_at(meta, at);
        memcpy(out + (nibble & 3) * size, values, (size_t)size);
        memcpy(out + (nibble >> 2 & 3) * size, values + size, (size_t)size);
    }
}

INLINE void gather24(const char *row, const uint8_t *meta, char *values, int64_t n, int size)
{
    for (int64_t at = 0; at < n; at += 4, values += 2 * size, row += 4 * size) {
        int nibble = nibble_at(meta, at);
        memcpy(values, row + (nibble & 3) * size, (size_t)size);
        memcpy(values + size, row + (nibble >> 2 & 3) * size, (size_t)size);
    }
}

static void finish(void) {}

static int supported(void) { return 1; }

SRT_ROW_KERNELS(, 2)
SRT_ROW_KERNELS(, 4)
SRT_ROW_TABLE(scalar);
