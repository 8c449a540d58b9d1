/* Tiles of dY^T X for AVX-512: 6 rows x 64 columns of float32 sums in registers, see grad.h.
 *
 * With AVX512-BF16 two bf16 tokens a step are multiplied and summed in float32 by VDPBF16PS (twice the rate of float32
 * products, which torch needs because its CPU GEMM cannot give a float32 result for bf16 inputs). The instruction takes
 * denormal inputs as zero. Everything else is widened to float32 when it is packed.
 */
#include "avx512.h"
#include "avx512_float.h"
#include "grad.h"

#if defined(__x86_64__)

#define TARGET_BF16 __attribute__((target(AVX512 ",avx512bf16")))

enum { VECTORS = GRAD_COLUMNS / 16 };
/* Steps summed in registers before they are added to a tile in the cache. Short sums lose less than one long one (2e-7
 * against 7e-7 of the largest gradient for 256 float32 tokens in one sum); 64 cost 1% of the time, 32 cost 4%. */
enum { STEPS = 64 };

/* ---- packing -------------------------------------------------------------------------------------------------- */

INLINE __m512i load_words(const char *from, __mmask16 lanes)
{
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
}

/* 16 lanes of one step: a pair of bf16 of the tokens at `at` and `next` (NULL: there is none), or one token as float32. */
INLINE __m512i step_lanes(const char *at, const char *next, int number, __mmask16 lanes, int pairs)
{
    if (pairs) {
        __m512i second = next ? load_words(next, lanes) : _mm512_setzero_si512();
        return _mm512_or_si512(load_words(at, lanes), _mm512_slli_epi32(second, 16));
    }
    return _mm512_castps_si512(load_numbers(at, lanes, number));
}

INLINE void pack(const char *from, int number, int64_t tokens, int64_t columns, int64_t width, int64_t first,
                 int64_t last, uint32_t *to, int pairs)
{
    int64_t size = srt_number_bytes(number), stride = columns * size, each = pairs ? 2 : 1;
    int64_t steps = (tokens + each - 1) / each;
    for (int64_t step = 0; step < steps; step++) {
        const char *token = from + step * each * stride;
        int64_t further = pairs && step * each + 1 < tokens ? stride : 0;
        for (int64_t unit = first; unit < last; unit++)
            for (int64_t c = 0; c < width; c += 16) {
                int64_t column = unit * width + c, left = srt_min(columns - column, srt_min(width - c, 16));
                __mmask16 lanes = (__mmask16)srt_low_bits(left < 0 ? 0 : left);
                const char *at = token + column * size;
                __m512i packed = step_lanes(at, further ? at + further : 0, number, lanes, pairs);
                _mm512_mask_storeu_epi32(to + (unit * steps + step) * width + c,
                                         (__mmask16)srt_low_bits(srt_min(width - c, 16)), packed);
            }
    }
}

/* ---- product ---------------------------------------------------------------------------------------------------- */

/* tile [6][64] += dy unit [steps][6] times x unit [steps][64]; `fresh`: the tile starts at zero. */
#define DEFINE_TILE(NAME, TARGET_OF_IT, PRODUCT)                                                                       \
    TARGET_OF_IT static void NAME(float *tile, const uint32_t *dy, const uint32_t *x, int64_t steps, int fresh)        \
    {                                                                                                                  \
        __m512 sums[GRAD_ROWS][VECTORS];                                                                               \
        _Pragma("GCC unroll 6") for (int r = 0; r < GRAD_ROWS; r++)                                                    \
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)                                                  \
                sums[r][v] = _mm512_setzero_ps();                                                                      \
        for (int64_t step = 0; step < steps; step++, dy += GRAD_ROWS, x += GRAD_COLUMNS) {                             \
            __m512i columns[VECTORS];                                                                                  \
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++) columns[v] = _mm512_load_si512(x + 16 * v);      \
            _Pragma("GCC unroll 6") for (int r = 0; r < GRAD_ROWS; r++) {                                              \
                __m512i row = _mm512_set1_epi32((int)dy[r]);                                                           \
                _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)                                              \
                    sums[r][v] = PRODUCT(sums[r][v], row, columns[v]);                                                 \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 6") for (int r = 0; r < GRAD_ROWS; r++)                                                    \
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++) {                                                \
                float *to = tile + r * GRAD_COLUMNS + 16 * v;                                                          \
                _mm512_store_ps(to, fresh ? sums[r][v] : _mm512_add_ps(_mm512_load_ps(to), sums[r][v]));               \
            }                                                                                                          \
    }

#define PAIR_PRODUCT(sum, row, column) _mm512_dpbf16_ps(sum, (__m512bh)(row), (__m512bh)(column))
#define FLOAT_PRODUCT(sum, row, column) _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(column), sum)

DEFINE_TILE(pair_tile, TARGET_BF16, PAIR_PRODUCT)
DEFINE_TILE(float_tile, TARGET, FLOAT_PRODUCT)

/* ---- what is kept ----------------------------------------------------------------------------------------------- */

INLINE char *keep(char *to, __mmask16 mask, __m512 sums, int number, int add)
{
    int64_t kept = popcount(mask);
    __mmask16 lanes = (__mmask16)srt_low_bits(kept);
    sums = _mm512_maskz_compress_ps(mask, sums);
    if (add)
        sums = _mm512_add_ps(sums, load_numbers(to, lanes, number));
    store_numbers(to, lanes, sums, number);
    return to + kept * srt_number_bytes(number);
}

TARGET static char *keep_row(char *to, uint64_t word, const float *sums, int number, int add)
{
    for (; word; word >>= 16, sums += 16)
        to = keep(to, (__mmask16)word, _mm512_load_ps(sums), number, add);
    return to;
}

/* ---- or what the factors need of it ------------------------------------------------------------------------------ */

/* 64 columns of one row from column `at` on. Moves `values`, adds to da, and returns sum_j G w a in 16 parts. */
INLINE __m512 reduce_row(const char **values, uint64_t word, const float *sums, const srt_grad_block *b, int64_t row,
                         int64_t at, int number)
{
    __m512 factor = _mm512_set1_ps(b->scale * b->b[row]), total = _mm512_setzero_ps();
    const float *a = b->a[row] + at;
    float *da = b->da[row] + at;
    for (; word; word >>= 16, a += 16, da += 16, sums += 16) {
        __mmask16 mask = (__mmask16)word; /* has no bit behind column n, so nothing is touched there */
        int64_t kept = popcount(mask);
        __m512 w = load_numbers(*values, (__mmask16)srt_low_bits(kept), number);
        __m512 product = _mm512_mul_ps(_mm512_maskz_expand_ps(mask, w), _mm512_load_ps(sums));
        total = _mm512_fmadd_ps(product, _mm512_maskz_loadu_ps(mask, a), total);
        _mm512_mask_storeu_ps(da, mask, _mm512_fmadd_ps(product, factor, _mm512_maskz_loadu_ps(mask, da)));
        *values += kept * srt_number_bytes(number);
    }
    return total;
}

TARGET static void reduce_rows(const char **values, const float *tiles, const srt_grad_block *b, int64_t at, float *db)
{
    for (int64_t row = 0; row < b->rows; row++) {
        uint64_t word = mask_at(b->meta + row * b->meta_stride, b->nibbles, at, b->n);
        const float *sums = tiles + row * GRAD_COLUMNS;
        __m512 total = b->number == SRT_BF16 ? reduce_row(values + row, word, sums, b, row, at, SRT_BF16)
                                             : reduce_row(values + row, word, sums, b, row, at, b->number);
        _mm512_store_ps(db + 16 * row, _mm512_add_ps(total, _mm512_load_ps(db + 16 * row)));
    }
}

TARGET static void finish_db(const float *parts, const srt_grad_block *b)
{
    for (int64_t row = 0; row < b->rows; row++)
        b->db[row] = (b->add ? b->db[row] : 0) + b->scale * _mm512_reduce_add_ps(_mm512_load_ps(parts + 16 * row));
}

/* ---- a block of rows ---------------------------------------------------------------------------------------------- */

typedef void tile_kernel(float *tile, const uint32_t *dy, const uint32_t *x, int64_t steps, int fresh);

TARGET static void block(const srt_grad_block *b, tile_kernel *kernel)
{
    float tiles[GRAD_BLOCK * GRAD_COLUMNS] __attribute__((aligned(64)));
    float db[GRAD_BLOCK * 16] __attribute__((aligned(64))) = {0};
    const char *values[GRAD_BLOCK];
    memcpy(values, b->values, (size_t)b->rows * sizeof *values);
    for (int64_t at = 0; at < b->n; at += GRAD_COLUMNS) {
        const uint32_t *x = b->x + at * b->steps;
        for (int64_t step = 0; step < b->steps; step += STEPS)
            for (int64_t row = 0; row < b->rows; row += GRAD_ROWS)
                kernel(tiles + row * GRAD_COLUMNS, b->dy + row * b->steps + step * GRAD_ROWS, x + step * GRAD_COLUMNS,
                       srt_min(STEPS, b->steps - step), step == 0);
        if (b->a)
            reduce_rows(values, tiles, b, at, db);
        else
            for (int64_t row = 0; row < b->rows; row++) {
                uint64_t word = mask_at(b->meta + row * b->meta_stride, b->nibbles, at, b->n);
                values[row] = keep_row((char *)values[row], word, tiles + row * GRAD_COLUMNS, b->number, b->add);
            }
    }
    if (b->a)
        finish_db(db, b);
}

TARGET static void pack_pairs(const char *from, int number, int64_t tokens, int64_t columns, int64_t width,
                              int64_t first, int64_t last, uint32_t *to)
{
    pack(from, number, tokens, columns, width, first, last, to, 1);
}

TARGET static void pack_floats(const char *from, int number, int64_t tokens, int64_t columns, int64_t width,
                               int64_t first, int64_t last, uint32_t *to)
{
    pack(from, number, tokens, columns, width, first, last, to, 0);
}

static void block_pairs(const srt_grad_block *b) { block(b, pair_tile); }
static void block_floats(const srt_grad_block *b) { block(b, float_tile); }

const srt_grad srt_grad_avx512 = {1, pack_floats, block_floats};
const srt_grad srt_grad_avx512_bf16 = {2, pack_pairs, block_pairs};

int srt_grad_has_bf16(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}

#endif
