/* y = x W^T with a weight that is read where it lies: the canonical values and metadata of an ONNX file, mapped into
 * memory and never rearranged.
 *
 * Rows are taken 16 at a time (a unit). With few tokens a row is expanded in registers and multiplied as it is read.
 * With more a part of the unit is expanded to float once (the panel) and multiplied with a block of tokens. All sums
 * are float32; how they are grouped depends on the number of tokens, never on the number of threads. */
#ifndef SPARSE_RT_ORT_LINEAR_H
#define SPARSE_RT_ORT_LINEAR_H

#include <stdint.h>

#include "numbers.h"
#include "rows.h"

/* A panel is up to 16 rows x 4096 columns (280 KB, second-level cache): whole rows, or long parts of them, so that
 * values are read as one stream (16 tokens, by hand: 7 cycles for 16 weights, 16 with parts of 512 columns). A block
 * of tokens has 96 KB of sums. */
enum { SRT_UNIT = 16, SRT_LANES = 16, SRT_PANEL_COLUMNS = 4096, SRT_BLOCK_TOKENS = 96 };
enum { SRT_TILE_ROWS = 4, SRT_TILE_TOKENS = 6, SRT_X_ALIGN = 64 };
/* Between the tokens of x and the rows of a panel: a multiple of 4 KB would put all into the same sets of the first-
 * level cache. */
enum { SRT_X_APART = 192, SRT_PANEL_STRIDE = SRT_PANEL_COLUMNS + 272 };
enum { SRT_MAX_FEW = 8, SRT_MESSAGE = 256 };

/* Which columns of a row have a value: those of a bitmask, two of every four, all. */
enum { SRT_KEEP_BITMASK, SRT_KEEP_PAIRS, SRT_KEEP_ALL };

/* Beside the dtypes of numbers.h: bytes from -128 to 127 that are multiplied with a scale (SRT_KEEP_BITMASK only). */
enum { SRT_INT8 = SRT_NUMBERS };

typedef struct {
    const char *values, *values_end; /* row by row, columns ascending; nothing behind the end is read */
    const uint8_t *meta;             /* [m][ceil(n / 8)]: bitmask, or nibbles of 2:4 */
    const int32_t *offsets;          /* [m + 1], SRT_KEEP_BITMASK: first value of a row */
    const float *scales;             /* [m][ceil(n / group)], SRT_INT8 */
    int64_t m, n, group;             /* columns that share a scale: all n, or a power of two from 64 to 256 */
    int kind, dtype;                 /* SRT_KEEP_BITMASK ..; SRT_BF16, SRT_FP16, SRT_FP32, SRT_INT8 */
    int rounds_x;                    /* SRT_INT8: x may be rounded to bytes, too */
} srt_weight;

static inline int64_t srt_value_bytes(int dtype) { return dtype == SRT_INT8 ? 1 : srt_number_bytes(dtype); }
static inline int64_t srt_meta_bytes(const srt_weight *w) { return (w->n + 7) / 8; }
static inline const char *srt_row_values(const srt_weight *w, int64_t row)
{
    int64_t first = w->kind == SRT_KEEP_BITMASK ? w->offsets[row] : row * (w->kind == SRT_KEEP_PAIRS ? w->n / 2 : w->n);
    return w->values + first * srt_value_bytes(w->dtype);
}
static inline const float *srt_row_scales(const srt_weight *w, int64_t row)
{
    return w->scales + row * srt_divide_up(w->n, w->group);
}

/* x rounded to bytes: 128 + round(x / scale), a scale for every 256 columns of a token. So the error of a block is at
 * most 1/254 of its own largest entry, whatever the other blocks hold. */
enum { SRT_BYTE_BLOCK = 256, SRT_BYTE_TOKENS = 12, SRT_BYTE_COLUMNS = 2048 };
typedef struct {
    const uint8_t *data; /* [tokens][ld], ld a multiple of 64; anything behind column n */
    const float *scales; /* [tokens][blocks] */
    int64_t ld, blocks;
} srt_bytes;

/* One instruction set. */
typedef struct {
    const srt_rows *rows;
    int few; /* up to so many tokens are multiplied with rows as they are read, at most SRT_MAX_FEW; 0: none */

    /* out [tokens][16] = the rows [row, row + count) of one unit times x [tokens][ldx], ldx a multiple of 64, zeros
     * behind column n, its order as few_order says. 64 bytes may be read behind the values of every row. */
    void (*few_rows)(const srt_weight *w, int64_t row, int64_t count, const float *x, int64_t ldx, int tokens,
                     float *out);
    /* x [ldx] in the order in which few_rows wants it for weights of dtype. */
    void (*few_order)(const float *x, int64_t ldx, int dtype, float *out);

    /* sums [tokens][16][16 lanes] += 4 rows of a panel, SRT_PANEL_STRIDE apart, times x [tokens <= 6][ldx], over
     * `columns` columns, a multiple of 16. For 16 of them each a cache line from `ahead` on is fetched; any address
     * will do. */
    void (*tile)(const float *panel, int64_t columns, const float *x, int64_t ldx, int tokens, float *sums,
                 const char *ahead);
    /* out [16] = the sums of the lanes of sums [16][16]. */
    void (*add_lanes)(const float *sums, float *out);
    /* `count` numbers of dtype -> float32. */
    void (*widen)(const void *from, int64_t count, int dtype, float *out);

    /* SRT_INT8 times bytes; NULL, or has_bytes() 0: such weights are expanded to float. */
    int (*has_bytes)(void);
    void (*round_x)(const float *x, int64_t n, uint8_t *out, float *scales);
    /* sums [tokens][16][16 lanes] += columns [at, end) of one row, whose values begin at `values`, times x from token
     * `first` on, at most SRT_BYTE_TOKENS; `at` is a multiple of 256. A scale of the whole row is left to the caller.
     * Returns where the values of column `end` begin. */
    const char *(*byte_row)(const srt_weight *w, int64_t row, const char *values, int64_t at, int64_t end,
                            const srt_bytes *x, int64_t first, int tokens, float *sums);
} srt_linear;

extern const srt_linear srt_linear_scalar;
#if defined(__x86_64__)
extern const srt_linear srt_linear_avx2, srt_linear_avx512;
#endif

/* Chooses one by name, or with "" the best that this processor runs. 0, or -1 where there is none. */
int srt_use_linear(const char *name);
const srt_linear *srt_chosen_linear(void);

/* 0, or -1 with a sentence in message [SRT_MESSAGE]: row offsets and metadata that contradict each other or the
 * number of values. Only a weight that passed may be multiplied with. */
int srt_check_weight(const srt_weight *w, int64_t values, char *message);

/* Runs `run` for 0 .. count - 1 on the caller's threads; 0, or -1 where it could not. */
typedef int srt_spread(void *threads, void (*run)(void *data, size_t index), size_t count, void *data);

/* y [tokens][m] of dtype = x [tokens][n] of dtype times the weight. 0, or -1 for want of memory or threads. */
int srt_multiply_rows(const srt_weight *w, const void *x, int64_t tokens, void *y, int dtype, srt_spread *spread,
                      void *threads);

#endif
