/* Products with packed weights: one as the C ABI, or a list of them at once for other C files. See product.c. */
#ifndef SPARSE_RT_PRODUCT_H
#define SPARSE_RT_PRODUCT_H

#include "export.h"
#include "packed.h"

EXPORT int srt_packed_kind(const void *packed, int64_t bytes, int64_t m, int64_t n);
EXPORT int64_t srt_packed_workspace(const void *packed, int64_t tokens);
EXPORT int srt_packed_linear(const void *packed, int64_t bytes, int64_t m, int64_t n, const void *x, int64_t ldx,
                      int64_t tokens, const void *bias, void *y, int64_t ldy, void *workspace, int threads);

/* y [tokens, m] = x [tokens, n] W^T + bias. ldx and ldy are elements between tokens, bias may be NULL. */
typedef struct {
    const srt_packed *w;
    const char *x, *bias;
    char *y, *prepared; /* prepared: room for srt_x_bytes of every token */
    int64_t tokens, ldx, ldy;
    /* Writes tokens [start, stop) of x, on the thread that reads them next; NULL where they are there already. */
    void (*fill)(void *context, int64_t start, int64_t stop);
    void *context;
    /* What srt_multiply decides: */
    const srt_tiles *tiles;
    const srt_kernel *kernel;
    const srt_dense *dense; /* NULL: every block is multiplied for itself */
    int64_t token_bytes, blocks, parts, chunks;
    int size;
} srt_product;

/* Every product of the list; all threads work on all of them, so they meet twice however many products there are. */
void srt_multiply(srt_product *products, int64_t count, int threads);

/* The kernels in use. */
const srt_tiles *srt_chosen_tiles(void);

/* Bytes that a token of n elements takes for any packed weight of this dtype that the kernels in use read. */
int64_t srt_x_bytes(int dtype, int64_t n);

#endif
