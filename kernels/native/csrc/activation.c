/* Activations and the weighted sum over experts, in portable C. The functions are those of torch:
 *
 *     silu        x / (1 + exp(-x))
 *     gelu        x / 2 (1 + erf(x / sqrt(2)))
 *     gelu_tanh   x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
 *     relu2       max(x, 0)^2
 */
#include "activation.h"

#include <math.h>

#include "scalar_float.h"

static float apply(int function, float x)
{
    switch (function) {
    case SRT_SILU: return x / (1 + expf(-x));
    case SRT_GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case SRT_GELU_TANH: return x / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    default: return x < 0 ? 0 : x * x; /* NaN stays NaN */
    }
}

void srt_activate(int function, int dtype, char *h, const char *up, int64_t count)
{
    int64_t size = srt_number_bytes(dtype);
    for (int64_t i = 0; i < count; i++) {
        srt_store_float(h + i * size, apply(function, srt_load_float(h + i * size, dtype)), dtype);
        if (up)
            srt_store_float(h + i * size, srt_load_float(h + i * size, dtype) * srt_load_float(up + i * size, dtype),
                            dtype);
    }
}

void srt_add_scaled(float *sums, float scale, const char *row, int64_t count, int dtype)
{
    int64_t size = srt_number_bytes(dtype);
    for (int64_t i = 0; i < count; i++)
        sums[i] += scale * srt_load_float(row + i * size, dtype);
}
