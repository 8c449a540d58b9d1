/* Tile kernels in portable C: the fallback of processors without AVX2, and the check of all others. */
#include <string.h>

#include "packed.h"
#include "scalar_float.h"

enum { SCALAR_TOKENS = 8 };

static void bitmask(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out)
{
    int wide = w->dtype == SRT_FP32, size = srt_element_size(w->dtype);
    const char *values = srt_data(w) + srt_offsets(w)[unit] * size;
    const char *masks = srt_masks(w) + unit * w->stride * (wide ? 2 : 4);
    memset(out, 0, sizeof(float) * (size_t)(tokens * SRT_PANEL));
    for (int64_t v = 0; v < w->stride; v++) {
        uint32_t mask = 0;
        memcpy(&mask, masks + v * (wide ? 2 : 4), wide ? 2 : 4);
        for (; mask; mask &= mask - 1, values += size) {
            int bit = __builtin_ctz(mask), row = wide ? bit : bit / 2;
            const float *column = (const float *)x + (wide ? v : 2 * v + (bit & 1)) * tokens;
            float value = srt_load_float(values, w->dtype);
            for (int t = 0; t < tokens; t++)
                out[t * SRT_PANEL + row] += value * column[t];
        }
    }
}

void srt_scalar_store(const float *tile, const void *bias, void *y, int64_t rows, int dtype)
{
    int size = srt_element_size(dtype);
    for (int64_t r = 0; r < rows; r++) {
        float add = bias ? srt_load_float((const char *)bias + r * size, dtype) : 0;
        srt_store_float((char *)y + r * size, tile[r] + add, dtype);
    }
}

static int supported(void) { return 1; }

const srt_tiles srt_tiles_scalar = {
    .name = "scalar",
    .supported = supported,
    .kernels = {[SRT_BITMASK] = {
                    [SRT_BF16] = {bitmask, SRT_X_FLOAT, SCALAR_TOKENS},
                    [SRT_FP16] = {bitmask, SRT_X_FLOAT, SCALAR_TOKENS},
                    [SRT_FP32] = {bitmask, SRT_X_FLOAT, SCALAR_TOKENS},
                }},
    .store = srt_scalar_store,
    .x_pack = srt_x_pack,
    .activate = srt_activate,
    .add_scaled = srt_add_scaled,
};
