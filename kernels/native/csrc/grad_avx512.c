/* Tiles of dY^T X for AVX-512: 6 rows x 64 columns of float32 sums in registers, 24 of the 32 there are. See grad.h. */
#include "grad_avx512.h"

#if defined(__x86_64__)

enum { VECTORS = GRAD_COLUMNS / 16 };
/* Steps summed in registers before they are added to a tile in the cache. Short sums lose less than one long one (2e-7
 * against 7e-7 of the largest gradient for 256 float32 tokens in one sum); 64 cost 1% of the time, 32 cost 4%. */
enum { STEPS = 64 };

/* ---- packing ---------------------------------------------------------------------------------------------------- */

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

DEFINE_TILE(pair_tile, TARGET_BF16, PAIR_PRODUCT)
DEFINE_TILE(float_tile, TARGET, FLOAT_PRODUCT)

/* ---- a block of rows -------------------------------------------------------------------------------------------- */

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
        for (int64_t row = 0; row < b->rows; row++) {
            uint64_t word = mask_at(b->meta + row * b->meta_stride, b->nibbles, at, b->n);
            finish_word(b, row, at, word, tiles + row * GRAD_COLUMNS, values + row, db + 16 * row);
        }
    }
    finish_db(b, db);
}

DEFINE_PACKER(pack_pairs, pack, 1)
DEFINE_PACKER(pack_floats, pack, 0)

static void block_pairs(const srt_grad_block *b) { block(b, pair_tile); }
static void block_floats(const srt_grad_block *b) { block(b, float_tile); }

const srt_grad srt_grad_tiles = {1, 1, GRAD_COLUMNS, GRAD_ROWS, pack_floats, block_floats};
const srt_grad srt_grad_tiles_bf16 = {2, 1, GRAD_COLUMNS, GRAD_ROWS, pack_pairs, block_pairs};

#endif
