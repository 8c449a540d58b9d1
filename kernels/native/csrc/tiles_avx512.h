/* What the two files of AVX-512 tile kernels share. */
#ifndef SPARSE_RT_TILES_AVX512_H
#define SPARSE_RT_TILES_AVX512_H

#include <string.h>

#include "packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum { SRT_FMA_TOKENS = 12 };

/* Zero-masked expand from a register. On Zen 4 VPEXPANDW waits for its destination register although zero-masking
 * overwrites all of it: 5.0 cycles in a chain against 1.5 when a zeroing idiom breaks it, and which one the compiler
 * produces changes with unrelated edits. So the vpxor is written down. ("x": registers 0-15, which VEX can encode.) */
#define SRT_EXPAND(NAME, INSTRUCTION, MASK)                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vbmi2"), always_inline)) static inline __m512i NAME(MASK mask,       \
                                                                                                      __m512i from)    \
    {                                                                                                                  \
        __m512i to;                                                                                                    \
        __asm__("vpxor %x0, %x0, %x0\n\t" INSTRUCTION " %1, %0%{%2%}%{z%}" : "=&x"(to) : "v"(from), "Yk"(mask));       \
        return to;                                                                                                     \
    }

SRT_EXPAND(srt_expand_words, "vpexpandw", __mmask32)
SRT_EXPAND(srt_expand_doubles, "vpexpandd", __mmask16)

/* A kernel for every number of tokens from 1 to 12, or to 24, from one body with the number as a constant: a macro
 * BODY(T) that makes the call. */
#define SRT_TILE(BODY, T)                                                                                              \
    case T: BODY(T); break;
#define SRT_TILES_TO_12(BODY)                                                                                          \
    SRT_TILE(BODY, 1) SRT_TILE(BODY, 2) SRT_TILE(BODY, 3) SRT_TILE(BODY, 4) SRT_TILE(BODY, 5) SRT_TILE(BODY, 6)        \
    SRT_TILE(BODY, 7) SRT_TILE(BODY, 8) SRT_TILE(BODY, 9) SRT_TILE(BODY, 10) SRT_TILE(BODY, 11) SRT_TILE(BODY, 12)
#define SRT_TILES_TO_24(BODY)                                                                                          \
    SRT_TILES_TO_12(BODY)                                                                                              \
    SRT_TILE(BODY, 13) SRT_TILE(BODY, 14) SRT_TILE(BODY, 15) SRT_TILE(BODY, 16) SRT_TILE(BODY, 17) SRT_TILE(BODY, 18)  \
    SRT_TILE(BODY, 19) SRT_TILE(BODY, 20) SRT_TILE(BODY, 21) SRT_TILE(BODY, 22) SRT_TILE(BODY, 23) SRT_TILE(BODY, 24)

srt_tile srt_avx512_bitmask_bf16, srt_avx512_bitmask_fp16, srt_avx512_bitmask_fp32;
extern const srt_dense srt_avx512_dense_bf16, srt_avx512_dense_fp16, srt_avx512_dense_fp32;
srt_x_packer srt_avx512_x_pack;
srt_activation srt_avx512_activate;
srt_scaled_sum srt_avx512_add_scaled;
void srt_avx512_store(const float *tile, const void *bias, void *y, int64_t rows, int dtype);

#endif
#endif
