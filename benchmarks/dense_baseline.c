/* A dense bf16 product for AVX-512 BF16, written only to be compared with: y [T, m] = x [T, n] W^T, W [m, n].
 *
 * Against torch alone a sparse kernel looks better than it is, because torch leaves a third to a half of the memory
 * bandwidth unused at one token. So this one does what a dense kernel can do:
 *
 *   weights   panels of 16 rows; in a panel a pair of columns after the other, 16 rows x 2 columns = one vector, so the
 *             sums of 16 rows stay in the lanes and nothing is reduced. Rows and columns are filled up with zeros.
 *   x         blocks of up to 24 tokens, packed [n / 2][tokens] pairs: one broadcast a token and a vector of weights.
 *   product   one VDPBF16PS a cycle is the limit from about 8 tokens on (Zen 4), memory below.
 *   threads   OpenMP over the panels, several chunks a thread on demand.
 *
 * Milliseconds in comments: 11008 x 4096, one core of an AMD EPYC (Zen 4), weights in huge pages.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { LANES = 16, MAX_BLOCK = 24, MAX_PANELS = 4, PREFETCH = 8192, CHUNKS_PER_THREAD = 8 };

typedef struct {
    const uint32_t *x; /* packed: blocks one after the other */
    const uint16_t *w; /* packed panels */
    uint16_t *y;
    int64_t m, pairs, tokens;
} product;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* 1 where this processor has the instructions. */
EXPORT int dense_supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

/* ---- packing -------------------------------------------------------------------------------------------------- */

/* out [ceil(m / 16)][ceil(n / 2)][16 rows][2] from w [m, n]. */
EXPORT void dense_pack(const uint16_t *w, uint16_t *out, int64_t m, int64_t n)
{
    int64_t pairs = (n + 1) / 2;
    memset(out, 0, (size_t)((m + LANES - 1) / LANES * pairs * LANES) * 4);
    for (int64_t row = 0; row < m; row++) {
        uint16_t *to = out + (row / LANES * pairs * LANES + row % LANES) * 2;
        for (int64_t c = 0; c < n; c++)
            to[c / 2 * LANES * 2 + c % 2] = w[row * n + c];
    }
}

/* Tokens of the block that starts with `left` tokens to go. Sizes without a kernel are filled up with zeros. */
static int64_t block_tokens(int64_t left)
{
    static const int sizes[] = {1, 2, 4, 8, 16, MAX_BLOCK};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (left <= sizes[i])
            return sizes[i];
    return MAX_BLOCK;
}

/* Pairs of x that the packed tokens take. */
EXPORT int64_t dense_scratch_pairs(int64_t tokens, int64_t n)
{
    return (tokens / MAX_BLOCK * MAX_BLOCK + block_tokens(tokens % MAX_BLOCK)) * ((n + 1) / 2);
}

/* rows[i] lane j -> rows[j] lane i */
INLINE void transpose(__m512i rows[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

/* Packs `real` tokens of x [tokens, n] as a block [pairs][block]; the tokens behind are zero. */
TARGET static void pack_block(const uint16_t *x, uint32_t *out, int64_t n, int64_t real, int64_t block)
{
    int64_t pairs = (n + 1) / 2;
    if (block == 1) {
        out[pairs - 1] = 0;
        memcpy(out, x, (size_t)n * 2);
        return;
    }
    for (int64_t first = 0; first < block; first += LANES) {
        __mmask16 stored = (__mmask16)((1u << min64(LANES, block - first)) - 1);
        for (int64_t p = 0; p < pairs; p += LANES) {
            int64_t columns = min64(2 * LANES, n - 2 * p);
            __mmask32 loaded = (__mmask32)((1ull << columns) - 1);
            __m512i rows[16];
            for (int64_t i = 0; i < LANES; i++)
                rows[i] = first + i < real ? _mm512_maskz_loadu_epi16(loaded, x + (first + i) * n + 2 * p)
                                           : _mm512_setzero_si512();
            transpose(rows);
            uint32_t *to = out + p * block + first;
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; i++)
                if (i < pairs - p)
                    _mm512_mask_storeu_epi32(to + i * block, stored, rows[i]);
        }
    }
}

/* ---- product -------------------------------------------------------------------------------------------------- */

/* From 8 tokens on the product is slow enough that the hardware's own prefetching falls asleep (16 tokens: 9.7 ms
 * without, 6.4 with); with fewer it only gets in the way (1 token: 3.4 ms with, 3.0 without). */
INLINE void prefetch(const uint16_t *w, const int TOKENS)
{
    if (TOKENS >= 8)
        _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
}

/* PANELS panels of y for `real` of TOKENS tokens, PAIRS pairs a step into sums of their own: a chain of VDPBF16PS waits
 * 6 cycles for itself. The last four arguments are constants at every call. */
INLINE void tile(const product *j, int64_t at, const uint32_t *x, uint16_t *y, int64_t real, const int TOKENS,
                 const int PANELS, const int PAIRS)
{
    const uint16_t *w[MAX_PANELS];
    __m512 sums[MAX_BLOCK]; /* not PANELS * ...: the compiler keeps no array of variable length in registers */
#pragma GCC unroll 8
    for (int r = 0; r < PANELS; r++)
        w[r] = j->w + (at + r) * j->pairs * LANES * 2;
#pragma GCC unroll 24
    for (int i = 0; i < PANELS * PAIRS * TOKENS; i++)
        sums[i] = _mm512_setzero_ps();
    int64_t p = 0;
    for (; p + PAIRS <= j->pairs; p += PAIRS)
#pragma GCC unroll 8
        for (int k = 0; k < PAIRS; k++)
#pragma GCC unroll 8
            for (int r = 0; r < PANELS; r++) {
                const uint16_t *from = w[r] + (p + k) * LANES * 2;
                __m512bh weights = (__m512bh)_mm512_loadu_si512(from);
                prefetch(from, TOKENS);
#pragma GCC unroll 24
                for (int t = 0; t < TOKENS; t++)
                    sums[(k * PANELS + r) * TOKENS + t] =
                        _mm512_dpbf16_ps(sums[(k * PANELS + r) * TOKENS + t], weights,
                                         (__m512bh)_mm512_set1_epi32((int)x[(p + k) * TOKENS + t]));
            }
    for (; p < j->pairs; p++)
#pragma GCC unroll 24
        for (int i = 0; i < PANELS * TOKENS; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(w[i / TOKENS] + p * LANES * 2),
                                       (__m512bh)_mm512_set1_epi32((int)x[p * TOKENS + i % TOKENS]));
#pragma GCC unroll 24
    for (int i = 0; i < PANELS * TOKENS; i++) {
        int64_t row = (at + i / TOKENS) * LANES, t = i % TOKENS;
        __m512 sum = sums[i];
#pragma GCC unroll 8
        for (int k = 1; k < PAIRS; k++)
            sum = _mm512_add_ps(sum, sums[k * PANELS * TOKENS + i]);
        __mmask16 rows = (__mmask16)((1u << min64(LANES, j->m - row)) - 1);
        if (t < real)
            _mm256_mask_storeu_epi16(y + t * j->m + row, rows, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* Panels [first, last) of one block of tokens. */
#define BLOCK(TOKENS, PANELS, PAIRS)                                                                                   \
    TARGET static void block_##TOKENS(const product *j, int64_t first, int64_t last, const uint32_t *x, uint16_t *y,   \
                                      int64_t real)                                                                    \
    {                                                                                                                  \
        for (; first + PANELS <= last; first += PANELS)                                                                \
            tile(j, first, x, y, real, TOKENS, PANELS, PAIRS);                                                         \
        for (; first < last; first++)                                                                                  \
            tile(j, first, x, y, real, TOKENS, 1, PAIRS);                                                              \
    }

/* Reading four panels at once keeps more memory requests in flight while four tokens share a load: 3.0 ms against 3.6
 * from one panel after the other (11008 x 4096). One token is as fast from one panel. */
BLOCK(1, 1, 8)
BLOCK(2, 4, 2)
BLOCK(4, 4, 1)
BLOCK(8, 2, 1)
BLOCK(16, 1, 1)
BLOCK(24, 1, 1)

TARGET static void run_block(int64_t block, const product *j, int64_t first, int64_t last, const uint32_t *x,
                             uint16_t *y, int64_t real)
{
    switch (block) {
    case 1: block_1(j, first, last, x, y, real); break;
    case 2: block_2(j, first, last, x, y, real); break;
    case 4: block_4(j, first, last, x, y, real); break;
    case 8: block_8(j, first, last, x, y, real); break;
    case 16: block_16(j, first, last, x, y, real); break;
    default: block_24(j, first, last, x, y, real); break;
    }
}

/* Panels [first, last) for all tokens: with several blocks of tokens a panel stays in the second-level cache while they
 * pass. */
static void run_panels(const product *j, int64_t first, int64_t last)
{
    int64_t step = j->tokens > MAX_BLOCK ? 1 : last - first;
    for (int64_t at = first; at < last; at += step)
        for (int64_t t = 0, block; t < j->tokens; t += block) {
            block = block_tokens(j->tokens - t);
            run_block(block, j, at, min64(at + step, last), j->x + t * j->pairs, j->y + t * j->m,
                      min64(block, j->tokens - t));
        }
}

/* y [tokens, m] = x [tokens, n] times the packed weight; scratch: dense_scratch_pairs(tokens, n) x 4 bytes. */
EXPORT void dense_linear(const uint16_t *x, const uint16_t *w, uint16_t *y, uint32_t *scratch, int64_t m, int64_t n,
                         int64_t tokens, int threads)
{
    int64_t count = (m + LANES - 1) / LANES, pairs = (n + 1) / 2;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > MAX_BLOCK)
#endif
    for (int64_t t = 0; t < tokens; t += MAX_BLOCK) { /* only the last block can be smaller */
        int64_t block = block_tokens(tokens - t);
        pack_block(x + t * n, scratch + t * pairs, n, min64(block, tokens - t), block);
    }
    product j = {.x = scratch, .w = w, .y = y, .m = m, .pairs = pairs, .tokens = tokens};
    int64_t chunks = min64((count + 3) / 4, threads == 1 ? 1 : (int64_t)threads * CHUNKS_PER_THREAD);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (int64_t c = 0; c < chunks; c++)
        run_panels(&j, count * c / chunks, count * (c + 1) / chunks);
}
