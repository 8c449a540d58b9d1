/* A product in plain C, which the compiler turns into vectors of the instruction set that TARGET names; LINEAR is the
 * name of the table and ROWS the native row kernels beside it. */
#include "linear.h"
#include "scalar_float.h"

TARGET static void tile(const float *panel, int64_t columns, const float *x, int64_t ldx, int tokens, float *sums,
                        const char *ahead)
{
    for (int64_t c = 0; c < columns; c += SRT_LANES)
        __builtin_prefetch(ahead + 4 * c);
    for (int64_t r = 0; r < SRT_TILE_ROWS; r++)
        for (int64_t t = 0; t < tokens; t++) {
            const float *weights = panel + r * SRT_PANEL_STRIDE, *row = x + t * ldx;
            float *to = sums + (t * SRT_UNIT + r) * SRT_LANES, lanes[SRT_LANES];
            memcpy(lanes, to, sizeof lanes);
            for (int64_t c = 0; c < columns; c += SRT_LANES)
                for (int lane = 0; lane < SRT_LANES; lane++)
                    lanes[lane] += weights[c + lane] * row[c + lane];
            memcpy(to, lanes, sizeof lanes);
        }
}

TARGET static void add_lanes(const float *sums, float *out)
{
    for (int64_t r = 0; r < SRT_UNIT; r++) {
        out[r] = 0;
        for (int lane = 0; lane < SRT_LANES; lane++)
            out[r] += sums[r * SRT_LANES + lane];
    }
}

TARGET static void widen(const void *from, int64_t count, int dtype, float *out)
{
    if (dtype == SRT_FP32)
        memcpy(out, from, sizeof(float) * (size_t)count);
    else if (dtype == SRT_BF16)
        for (int64_t i = 0; i < count; i++)
            out[i] = srt_load_float((const char *)from + 2 * i, SRT_BF16);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = srt_load_float((const char *)from + 2 * i, SRT_FP16);
}

const srt_linear LINEAR = {.rows = &ROWS, .tile = tile, .add_lanes = add_lanes, .widen = widen};
