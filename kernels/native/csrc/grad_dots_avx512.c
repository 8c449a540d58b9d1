/* Dot products over the tokens for the kept positions only, for AVX-512. See grad.h.
 *
 * x and dy are packed by column, tokens behind each other, so that one instruction takes 16 steps of one position, and
 * the number of instructions falls with the density. Each reads 64 bytes of dy, so the loads are the limit and dy has
 * to come from the first-level cache.
 */
#include "grad_avx512.h"

#if defined(__x86_64__)

/* Rows of dy and steps of them that a column of x meets: 16 KB, half of the first-level cache. The packed units have
 * the same blocks of steps, so that such a piece lies together: rows 2 KB apart (1024 tokens) would share half of the
 * cache's sets and cost twice the time. */
enum { ROWS = 32, LANES = 64, BLOCK_STEPS = 128 };
enum { HELD = 64 }; /* products put away together */

/* ---- packing ---------------------------------------------------------------------------------------------------- */

/* Units of `width` columns, a multiple of 16: for every block of steps [width][steps of the block], where the number of
 * steps is a multiple of 16; zeros behind the last token and column. */
INLINE void pack(const char *from, int number, int64_t tokens, int64_t columns, int64_t width, int64_t first,
                 int64_t last, uint32_t *to, int pairs)
{
    int64_t size = srt_number_bytes(number), stride = columns * size, each = pairs ? 2 : 1;
    int64_t steps = (tokens + 16 * each - 1) / (16 * each) * 16;
    for (int64_t step = 0; step < steps; step += 16)
        for (int64_t at = first * width; at < last * width; at += 16) {
            int64_t start = step / BLOCK_STEPS * BLOCK_STEPS, length = srt_min(BLOCK_STEPS, steps - start);
            uint32_t *out = to + at / width * width * steps + width * start + at % width * length + step - start;
            __mmask16 lanes = (__mmask16)srt_low_bits(at < columns ? srt_min(columns - at, 16) : 0);
            __m512i block[16];
            for (int64_t s = 0; s < 16; s++) {
                int64_t token = (step + s) * each;
                const char *here = from + token * stride + at * size;
                const char *next = token + 1 < tokens ? here + stride : 0;
                block[s] = token < tokens ? step_lanes(here, next, number, lanes, pairs) : _mm512_setzero_si512();
            }
            transpose(block);
            for (int64_t c = 0; c < 16; c++)
                _mm512_storeu_si512(out + c * length, block[c]);
        }
}

/* ---- product ---------------------------------------------------------------------------------------------------- */

/* The sums of 16 vectors, as one. */
INLINE __m512 sum_each(const __m512 from[16])
{
    __m512 pairs[8], quads[4], halves[2];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(from[2 * i], from[2 * i + 1]),
                                 _mm512_unpackhi_ps(from[2 * i], from[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d one = _mm512_castps_pd(pairs[2 * i]), other = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

/* Products whose 16 parts are still to be added up, and where in the tile each goes. */
typedef struct {
    __m512 parts[HELD + 16];
    int32_t where[HELD + 16], count;
} products;

/* Adds what is held to the tile, 16 products at a time; with `fresh` it is the first to come there. */
INLINE void put_away(products *held, float *tile, int fresh)
{
    float sums[16];
    for (int32_t p = 0; p < held->count; p += 16) {
        _mm512_storeu_ps(sums, sum_each(held->parts + p));
        for (int32_t i = 0; i < (held->count - p < 16 ? held->count - p : 16); i++) {
            float *to = tile + held->where[p + i];
            *to = fresh ? sums[i] : *to + sums[i];
        }
    }
    held->count = 0;
}

/* Which of the rows keep the column `lane` of 64, one bit a row. */
INLINE uint32_t rows_with(const uint64_t words[ROWS], int lane)
{
    __m512i bit = _mm512_set1_epi64((long long)((uint64_t)1 << lane));
    uint32_t rows = 0;
    for (int r = 0; r < ROWS; r += 8)
        rows |= (uint32_t)_mm512_test_epi64_mask(_mm512_load_si512(words + r), bit) << r;
    return rows;
}

/* tile [ROWS][LANES] (+)= dy [ROWS] times the columns of x [LANES] at the kept positions, over 16 VECTORS steps of
 * each, which lie `stride` apart. One column of x stays in registers while the rows that keep it pass by from the
 * first-level cache. */
#define DEFINE_DOTS(NAME, TARGET_OF_IT, PRODUCT, VECTORS)                                                              \
    TARGET_OF_IT static void NAME(float *tile, const uint64_t words[ROWS], const uint32_t *dy, const uint32_t *x,      \
                                  int64_t stride, int fresh)                                                           \
    {                                                                                                                  \
        products held;                                                                                                 \
        held.count = 0;                                                                                                \
        for (int lane = 0; lane < LANES; lane++) {                                                                     \
            uint32_t rows = rows_with(words, lane);                                                                    \
            if (!rows)                                                                                                 \
                continue;                                                                                              \
            __m512i column[VECTORS];                                                                                   \
            _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++)                                                  \
                column[v] = _mm512_loadu_si512(x + lane * stride + 16 * v);                                            \
            for (; rows; rows &= rows - 1) {                                                                           \
                int r = __builtin_ctz(rows);                                                                           \
                __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();                                          \
                _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++) {                                            \
                    __m512i row = _mm512_loadu_si512(dy + r * stride + 16 * v);                                        \
                    if (v % 2)                                                                                         \
                        odd = PRODUCT(odd, row, column[v]);                                                            \
                    else                                                                                               \
                        even = PRODUCT(even, row, column[v]);                                                          \
                }                                                                                                      \
                held.parts[held.count] = _mm512_add_ps(even, odd);                                                     \
                held.where[held.count++] = r * LANES + lane;                                                           \
            }                                                                                                          \
            if (held.count >= HELD - ROWS)                                                                             \
                put_away(&held, tile, fresh);                                                                          \
        }                                                                                                              \
        put_away(&held, tile, fresh);                                                                                  \
    }

DEFINE_DOTS(pair_dots_1, TARGET_BF16, PAIR_PRODUCT, 1)
DEFINE_DOTS(pair_dots_2, TARGET_BF16, PAIR_PRODUCT, 2)
DEFINE_DOTS(pair_dots_4, TARGET_BF16, PAIR_PRODUCT, 4)
DEFINE_DOTS(pair_dots_8, TARGET_BF16, PAIR_PRODUCT, 8)
DEFINE_DOTS(float_dots_1, TARGET, FLOAT_PRODUCT, 1)
DEFINE_DOTS(float_dots_2, TARGET, FLOAT_PRODUCT, 2)
DEFINE_DOTS(float_dots_4, TARGET, FLOAT_PRODUCT, 4)
DEFINE_DOTS(float_dots_8, TARGET, FLOAT_PRODUCT, 8)

/* ---- a block of rows -------------------------------------------------------------------------------------------- */

typedef void dots_kernel(float *tile, const uint64_t words[ROWS], const uint32_t *dy, const uint32_t *x, int64_t stride,
                         int fresh);

/* All steps of one tile, from a block of steps each of dy [ROWS][length] and x [LANES][length]. */
INLINE void form_tile(float *tile, const uint64_t words[ROWS], const uint32_t *dy, const uint32_t *x, int64_t steps,
                      dots_kernel *const kernels[4])
{
    for (int64_t start = 0; start < steps; start += BLOCK_STEPS) {
        int64_t length = srt_min(BLOCK_STEPS, steps - start), size;
        for (int64_t step = 0; step < length; step += size) {
            int kernel = 3;
            while (16 << kernel > length - step)
                kernel--;
            size = 16 << kernel;
            kernels[kernel](tile, words, dy + ROWS * start + step, x + LANES * start + step, length, start + step == 0);
        }
    }
}

TARGET static void some_rows(const srt_grad_block *b, int64_t first, int64_t rows, dots_kernel *const kernels[4],
                             const char **values, float *db)
{
    float tile[ROWS * LANES] __attribute__((aligned(64))) = {0};
    uint64_t words[ROWS] __attribute__((aligned(64))) = {0};
    for (int64_t at = 0; at < b->n; at += LANES) {
        for (int64_t r = 0; r < rows; r++)
            words[r] = mask_at(b->meta + (first + r) * b->meta_stride, b->nibbles, at, b->n);
        form_tile(tile, words, b->dy + first * b->steps, b->x + at * b->steps, b->steps, kernels);
        for (int64_t r = 0; r < rows; r++)
            finish_word(b, first + r, at, words[r], tile + r * LANES, values + first + r, db + 16 * (first + r));
    }
}

TARGET static void block(const srt_grad_block *b, dots_kernel *const kernels[4])
{
    float db[GRAD_BLOCK * 16] __attribute__((aligned(64))) = {0};
    const char *values[GRAD_BLOCK];
    memcpy(values, b->values, (size_t)b->rows * sizeof *values);
    for (int64_t first = 0; first < b->rows; first += ROWS)
        some_rows(b, first, srt_min(ROWS, b->rows - first), kernels, values, db);
    finish_db(b, db);
}

DEFINE_PACKER(pack_pairs, pack, 1)
DEFINE_PACKER(pack_floats, pack, 0)

static dots_kernel *const pair_kernels[4] = {pair_dots_1, pair_dots_2, pair_dots_4, pair_dots_8};
static dots_kernel *const float_kernels[4] = {float_dots_1, float_dots_2, float_dots_4, float_dots_8};

static void block_pairs(const srt_grad_block *b) { block(b, pair_kernels); }
static void block_floats(const srt_grad_block *b) { block(b, float_kernels); }

const srt_grad srt_grad_dots = {1, 16, LANES, ROWS, pack_floats, block_floats};
const srt_grad srt_grad_dots_bf16 = {2, 16, LANES, ROWS, pack_pairs, block_pairs};

#endif
