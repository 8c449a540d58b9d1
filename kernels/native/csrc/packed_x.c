/* The layouts of x that tile kernels read: every kernel finds the tokens of its block side by side. */
#include <string.h>

#include "packed.h"
#include "scalar_float.h"

int64_t srt_x_token_bytes(int kind, int64_t n)
{
    switch (kind) {
    case SRT_X_PAIRS: return srt_round_up(n, 8) * 2;
    case SRT_X_FLOAT: return srt_round_up(n, 8) * 4;
    case SRT_X_QUADS: return srt_round_up(n, 4 * SRT_PAIR_BLOCK) * 2;
    default: return (srt_round_up(srt_divide_up(n, SRT_WINDOW_STEP), 2) + 1) * 2 * SRT_WINDOW_STEP;
    }
}

/* out [units][tokens][unit bytes] from rows of bf16. A cache line of one token is used up before the next token's is
 * read: rows that lie 8 KB apart would push each other out of the first-level cache. */
static inline __attribute__((always_inline)) void interleave(const char *x, int64_t ld, int64_t n, int64_t units,
                                                             int tokens, char *out, int unit)
{
    int64_t per = 64 / unit, whole = n * 2 / unit;
    for (int64_t u = 0; u < units; u += per)
        for (int t = 0; t < tokens; t++)
            for (int64_t k = u; k < u + per && k < units; k++) {
                char *to = out + (k * tokens + t) * unit;
                if (k < whole) {
                    memcpy(to, x + t * ld * 2 + k * unit, (size_t)unit);
                } else { /* the end of the row, zeros behind it */
                    memset(to, 0, (size_t)unit);
                    if (n * 2 > k * unit)
                        memcpy(to, x + t * ld * 2 + k * unit, (size_t)(n * 2 - k * unit));
                }
            }
}

static void floats(int dtype, const char *x, int64_t ld, int64_t n, int64_t units, int tokens, float *out)
{
    int size = srt_element_size(dtype);
    for (int64_t u = 0; u < units; u += 16)
        for (int t = 0; t < tokens; t++)
            for (int64_t k = u; k < u + 16 && k < units; k++)
                out[k * tokens + t] = k < n ? srt_load_float(x + (t * ld + k) * size, dtype) : 0;
}

static void planes(const char *x, int64_t ld, int64_t n, int64_t windows, int tokens, char *out)
{
    for (int64_t g = 0; g < windows; g++)
        for (int t = 0; t < tokens; t++) {
            char *to = out + (g * tokens + t) * 2 * SRT_WINDOW_STEP, line[2 * SRT_WINDOW_STEP];
            int64_t count = n - g * SRT_WINDOW_STEP;
            count = count < 0 ? 0 : count > SRT_WINDOW_STEP ? SRT_WINDOW_STEP : count;
            memset(line, 0, sizeof line);
            memcpy(line, x + (t * ld + g * SRT_WINDOW_STEP) * 2 * (count > 0), (size_t)(2 * count));
            for (int i = 0; i < SRT_WINDOW_STEP; i++) {
                to[i] = line[2 * i];
                to[SRT_WINDOW_STEP + i] = line[2 * i + 1];
            }
        }
}

void srt_x_pack(int kind, int dtype, const char *x, int64_t ld, int64_t n, int tokens, char *out)
{
    int64_t bytes = srt_x_token_bytes(kind, n);
    switch (kind) {
    case SRT_X_PAIRS: interleave(x, ld, n, bytes / 4, tokens, out, 4); break;
    case SRT_X_FLOAT: floats(dtype, x, ld, n, bytes / 4, tokens, (float *)out); break;
    case SRT_X_QUADS: interleave(x, ld, n, bytes / 8, tokens, out, 8); break;
    default: planes(x, ld, n, bytes / (2 * SRT_WINDOW_STEP), tokens, out);
    }
}
