/* Floats of the three dtypes one at a time, in portable C. */
#ifndef SPARSE_RT_SCALAR_FLOAT_H
#define SPARSE_RT_SCALAR_FLOAT_H

#include <stdint.h>
#include <string.h>

#include "packed.h"

static inline float srt_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t srt_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float srt_half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) /* Inf, NaN */
        return srt_float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400)
        return srt_float_of_bits(sign | ((rest << 13) + (112u << 23)));
    return srt_float_of_bits(sign | srt_bits_of_float((float)rest * 0x1p-24f)); /* denormal or zero */
}

/* Nearest, ties to even. */
static inline uint16_t srt_float_to_half(float value)
{
    uint32_t bits = srt_bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* 65520 and more rounds to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) { /* below 2^-14: adding 0.5 puts the last bit of a denormal half at the last bit of a float */
        uint32_t shifted = srt_bits_of_float(srt_float_of_bits(rest) + 0.5f);
        return (uint16_t)(sign | (shifted - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - (112u << 23)) >> 13);
}

static inline float srt_load_float(const void *from, int dtype)
{
    uint16_t word;
    float value;
    if (dtype == SRT_FP32)
        return memcpy(&value, from, 4), value;
    memcpy(&word, from, 2);
    return dtype == SRT_BF16 ? srt_float_of_bits((uint32_t)word << 16) : srt_half_to_float(word);
}

static inline void srt_store_float(void *to, float value, int dtype)
{
    uint16_t word;
    uint32_t bits = srt_bits_of_float(value);
    if (dtype == SRT_FP32) {
        memcpy(to, &value, 4);
        return;
    }
    if (dtype == SRT_FP16)
        word = srt_float_to_half(value);
    else
        word = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy(to, &word, 2);
}

#endif
