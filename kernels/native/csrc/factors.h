/* Kept values times factors of their row and column: see factors.c. */
#ifndef SPARSE_RT_FACTORS_H
#define SPARSE_RT_FACTORS_H

#include "numbers.h"
#include "rows.h"

/* One row. `values` starts with the row's first value of type `number`. */
typedef struct {
    const uint8_t *meta;
    int nibbles, number;
    int64_t n;
    const char *values;
    const float *a; /* [n] */
    float b;        /* scale * B[row] */
} srt_factor_row;

typedef struct {
    /* out = values (base + b a) at the kept columns, rounded once to `out_number`. */
    void (*apply)(const srt_factor_row *row, float base, char *out, int out_number);
} srt_factors;

#if defined(__x86_64__)
extern const srt_factors srt_factors_avx512;
#endif

#endif
