/* dY^T X at the kept positions. The dense product never exists: what is not kept does not leave the registers.
 *
 *   tiles   grad_avx512.c: all of 6 rows x 64 columns in registers; the work does not depend on the density
 *   dots    grad_dots_avx512.c: only the kept positions, each a dot product over the tokens; for high sparsity
 *
 * Both inputs are packed first. A "step" is one token as float32, or two tokens as a pair of bf16 for VDPBF16PS, zeros
 * where the matrix has ended; a unit is a few columns of x or dy and all steps of them. Sums run over the tokens
 * in one fixed order, so results do not depend on the number of threads.
 */
#ifndef SPARSE_RT_GRAD_H
#define SPARSE_RT_GRAD_H

#include "numbers.h"
#include "rows.h"

/* The size of a tile; a row of it is one mask word. Rows of a block share what they read of x. */
enum { GRAD_ROWS = 6, GRAD_COLUMNS = 64, GRAD_BLOCK = 16 * GRAD_ROWS };

/* One block of rows of the product and what becomes of it. */
typedef struct {
    const uint32_t *dy, *x; /* packed: the units of this block, all units of x */
    int64_t steps, n, rows;
    const uint8_t *meta; /* of the first row */
    int64_t meta_stride;
    int nibbles;         /* 2:4 metadata rather than a bitmask */
    int number;          /* type of the values */
    const char *const *values; /* per row: its first value; written unless `a` is given */
    int add;             /* values and db are added to */

    /* With `a` the kept sums G are not written, only what the factors of a weight need of them (factors.c):
     * db[i] = scale sum_j G w a, and da of the row += scale b[i] G w, w being the values. Per row: */
    const float *const *a; /* [n] of its group */
    float *const *da;      /* [n] */
    const float *b;
    float *db, scale;
} srt_grad_block;

typedef struct {
    int tokens_a_step; /* 2: bf16 pairs, 1: float32 */
    int steps_unit;    /* the number of steps is a multiple of it */
    int x_width, dy_width; /* columns of a unit */
    /* Units [first, last) of a matrix [tokens, columns], cut into units of `width` columns. */
    void (*pack)(const char *from, int number, int64_t tokens, int64_t columns, int64_t width, int64_t first,
                 int64_t last, uint32_t *to);
    void (*block)(const srt_grad_block *block);
} srt_grad;

#if defined(__x86_64__)
extern const srt_grad srt_grad_tiles, srt_grad_tiles_bf16, srt_grad_dots, srt_grad_dots_bf16;
#endif

#endif
