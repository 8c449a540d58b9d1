/* Between the entries of packed weights (packed.c) and the code that makes and undoes them (packed_make.c). */
#ifndef SPARSE_RT_PACKED_MAKE_H
#define SPARSE_RT_PACKED_MAKE_H

#include "packed.h"

/* Canonical tensors of an (m, n) weight; `values` and `meta` are written only when a packed weight is undone. */
typedef struct {
    const char *values;
    const uint8_t *meta; /* [m, ceil(n / 8)]: bitmask or nibbles */
    const int64_t *starts; /* [panels + 1]: first value of every 16 rows */
    int64_t m, n, nnz;
    int nibbles, size;
} srt_source;

static inline void srt_mark(const srt_source *s, int64_t row, int64_t column)
{
    ((uint8_t *)s->meta)[row * ((s->n + 7) / 8) + column / 8] |= (uint8_t)(1 << column % 8);
}

/* Fills counts and steps [panels + 1] with running sums and the header; returns the number of kept elements. */
int64_t srt_plan(int layout, int dtype, const srt_source *s, int64_t *counts, int64_t *steps, int threads,
                 srt_packed *header);
/* out (header->bytes) from the canonical tensors. */
void srt_make(const srt_source *s, const int64_t *steps, const srt_packed *header, srt_packed *out, int threads);
/* The canonical tensors from a packed weight; counts is room for [panels + 1]. */
void srt_unmake(const srt_packed *w, srt_source *s, int64_t *counts, int threads);

#endif
