/* How the elements of a tensor are to be read, where a kernel computes with them; the Python side passes the same. */
#ifndef SPARSE_RT_NUMBERS_H
#define SPARSE_RT_NUMBERS_H

#include <stdint.h>

enum { SRT_BF16, SRT_FP16, SRT_FP32, SRT_NUMBERS };

static inline int64_t srt_number_bytes(int number) { return number == SRT_FP32 ? 4 : 2; }
static inline int64_t srt_divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
