/* The C ABI of the product with packed weights that other C files call too; packed.c says what the functions do. */
#ifndef SPARSE_RT_PRODUCT_H
#define SPARSE_RT_PRODUCT_H

#include <stdint.h>

#include "export.h"

EXPORT int srt_packed_kind(const void *packed, int64_t bytes, int64_t m, int64_t n);
EXPORT int64_t srt_packed_workspace(const void *packed, int64_t tokens);
EXPORT int srt_packed_linear(const void *packed, int64_t bytes, int64_t m, int64_t n, const void *x, int64_t ldx,
                      int64_t tokens, const void *bias, void *y, int64_t ldy, void *workspace, int threads);

#endif
