/* Between the two products of an expert; activation.c says what the functions compute. */
#ifndef SPARSE_RT_ACTIVATION_H
#define SPARSE_RT_ACTIVATION_H

#include <stdint.h>

/* The Python side passes the same numbers. */
enum { SRT_SILU, SRT_GELU, SRT_GELU_TANH, SRT_RELU2, SRT_FUNCTIONS };

/* h [count] = function(h), then times up [count] unless that is NULL; each step is rounded to the dtype. */
typedef void srt_activation(int function, int dtype, char *h, const char *up, int64_t count);

/* sums [count] += scale * row [count]. */
typedef void srt_scaled_sum(float *sums, float scale, const char *row, int64_t count, int dtype);

/* In portable C. */
srt_activation srt_activate;
srt_scaled_sum srt_add_scaled;

#endif
