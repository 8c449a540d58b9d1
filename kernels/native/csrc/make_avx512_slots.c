/* The maker of `slots` for AVX-512 with VBMI2.
 *
 * Every row has a queue of index bytes and one of values, in which padding stands where the layout has it: entries 4 k
 * to 4 k + 3 of all rows are step k. So the elements of a row are moved 64 at a time, and 16 steps leave the queues
 * through an exchange of rows and columns.
 */
#include "make_avx512.h"

#if defined(__x86_64__)

enum { BATCH = 16 }; /* steps that leave at once: 64 entries of each row */
/* Before a window is appended a queue has less than a batch of steps and at most 64 elements behind them; then 64 more
 * entries are written. */
enum { ENTRIES = 192 };

/* Which columns are kept: [2 g + h][r] is half h of window g of row r. */
typedef struct {
    _Alignas(64) uint32_t words[16][16];
} window_masks;

INLINE void load_windows(const srt_source *s, int64_t panel, int64_t at, __m512i words[16])
{
    load_lines(s, panel, at, words);
    transpose(words);
}

INLINE __m512i window_counts(const __m512i words[16], int64_t g)
{
    return _mm512_add_epi32(_mm512_popcnt_epi32(words[2 * g]), _mm512_popcnt_epi32(words[2 * g + 1]));
}

/* Steps until the longest of the queues is written. */
INLINE int steps_for(__m512i ends, int64_t written) { return (int)(_mm512_reduce_max_epi32(ends) - written + 3) / 4; }

/* ---- plan ----------------------------------------------------------------------------------------------------- */

/* Every element in front of the next window must be written by the end of a window, so its steps are known before the
 * next window is looked at; rows that are ahead then fill up with elements from there, or with padding. */
TARGET int64_t srt_avx512_count_steps(const srt_source *s, int64_t panel)
{
    __m512i ends = _mm512_setzero_si512(); /* entries of every row */
    int64_t total = 0;
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        __m512i words[16];
        load_windows(s, panel, at, words);
#pragma GCC unroll 8
        for (int64_t g = 0; g < 8; g++) {
            total += at + g ? steps_for(ends, 4 * total) : 0;
            ends = _mm512_add_epi32(ends, window_counts(words, g));
            ends = _mm512_max_epi32(ends, _mm512_set1_epi32((int)(4 * total)));
        }
    }
    return total + steps_for(ends, 4 * total);
}

/* ---- pack ----------------------------------------------------------------------------------------------------- */

typedef struct {
    _Alignas(64) uint8_t index[16][ENTRIES]; /* SRT_SLOT_PADDING behind the end of a row */
    _Alignas(64) uint16_t values[16][ENTRIES]; /* zeros there */
    _Alignas(64) int32_t ends[16];
    const char *from[17];
    char *step; /* where the front of the queues belongs */
    int steps;  /* in front that can be written */
} queues;

INLINE __m512i padding(void) { return _mm512_set1_epi8((char)SRT_SLOT_PADDING); }

TARGET static void open_queues(queues *q, const srt_source *s, const srt_packed *w, int64_t panel)
{
    char *rows[17];
    memset(q->index, SRT_SLOT_PADDING, sizeof q->index);
    memset(q->values, 0, sizeof q->values);
    memset(q->ends, 0, sizeof q->ends);
    find_rows(s, panel, rows);
    memcpy(q->from, rows, sizeof rows);
    q->step = (char *)srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    q->steps = 0;
}

/* Appends the elements that every row has in window g, whose masks are [2][16]. */
INLINE void append(queues *q, uint32_t (*masks)[16], int64_t g)
{
    char iota[64];
    for (int i = 0; i < 64; i++)
        iota[i] = (char)(i + 64 * (g & 1));
    __m512i columns = _mm512_loadu_si512(iota);
    for (int r = 0; r < 16; r++) {
        uint64_t mask = masks[0][r] | (uint64_t)masks[1][r] << 32;
        int64_t kept = popcount(mask);
        uint64_t lanes = srt_low_bits(kept);
        __m512i index = _mm512_mask_mov_epi8(padding(), lanes, compress_bytes(mask, columns));
        _mm512_storeu_si512(q->index[r] + q->ends[r], index);
        char *to = (char *)(q->values[r] + q->ends[r]);
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16((__mmask32)lanes, q->from[r]));
        _mm512_storeu_si512(to + 64, _mm512_maskz_loadu_epi16((__mmask32)(lanes >> 32), q->from[r] + 64));
        q->from[r] += 2 * kept;
        q->ends[r] += (int)kept;
    }
}

/* Writes the first `steps` <= BATCH steps. */
INLINE void write_batch(queues *q, int steps)
{
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        v[r] = _mm512_load_si512(q->index[r]);
    transpose(v);
#pragma GCC unroll 16
    for (int k = 0; k < BATCH; k++)
        if (k < steps)
            put_line(q->step + k * SRT_SLOT_STEP_BYTES, _mm512_shuffle_epi8(v[k], order));
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            v[r] = _mm512_load_si512(q->values[r] + 32 * half);
        transpose(v);
        char *to = q->step + 8 * half * SRT_SLOT_STEP_BYTES + 64;
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            if (8 * half + k / 2 < steps)
                put_line(to + k / 2 * SRT_SLOT_STEP_BYTES + k % 2 * 64, v[k]);
    }
    q->step += steps * SRT_SLOT_STEP_BYTES;
}

/* Forgets a batch that was written. */
INLINE void shift_queues(queues *q)
{
    q->steps -= BATCH;
    for (int r = 0; r < 16; r++) {
        uint8_t *index = q->index[r];
        char *values = (char *)q->values[r];
        _mm512_store_si512(index, _mm512_load_si512(index + 64));
        _mm512_store_si512(index + 64, _mm512_load_si512(index + 128));
        _mm512_store_si512(index + 128, padding());
#pragma GCC unroll 4
        for (int i = 0; i < 256; i += 64)
            _mm512_store_si512(values + i, _mm512_load_si512(values + i + 128));
        _mm512_store_si512(values + 256, _mm512_setzero_si512());
        _mm512_store_si512(values + 320, _mm512_setzero_si512());
    }
    __m512i ends = _mm512_load_si512(q->ends);
    _mm512_store_si512(q->ends, _mm512_sub_epi32(ends, _mm512_set1_epi32(4 * BATCH)));
}

/* Makes `steps` more steps final: a row that has nothing for them gets padding. */
INLINE void commit(queues *q, int steps)
{
    q->steps += steps;
    __m512i least = _mm512_set1_epi32(4 * q->steps);
    _mm512_store_si512(q->ends, _mm512_max_epi32(_mm512_load_si512(q->ends), least));
    if (q->steps >= BATCH) {
        write_batch(q, BATCH);
        shift_queues(q);
    }
}

TARGET void srt_avx512_pack_slots(const srt_source *s, srt_packed *w, int64_t panel)
{
    uint8_t *table = (uint8_t *)srt_masks(w) + panel * w->stride;
    int64_t windows = srt_divide_up(s->n, SRT_WINDOW_STEP);
    window_masks masks;
    queues q;
    open_queues(&q, s, w, panel);
    memset(table, 0, (size_t)w->stride);
    for (int64_t g = 0; g < windows; g++) {
        if (g % 8 == 0) {
            __m512i words[16];
            load_windows(s, panel, g * SRT_WINDOW_STEP, words);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(masks.words[i], words[i]);
        }
        int steps = g ? steps_for(_mm512_load_si512(q.ends), 4 * q.steps) : 0;
        append(&q, masks.words + 2 * (g % 8), g);
        if (g) {
            table[g - 1] = (uint8_t)steps;
            commit(&q, steps);
        }
    }
    if (windows) {
        int steps = steps_for(_mm512_load_si512(q.ends), 4 * q.steps);
        table[windows - 1] = (uint8_t)steps;
        commit(&q, steps);
        write_batch(&q, q.steps);
    }
    _mm_sfence();
}

/* ---- unpack --------------------------------------------------------------------------------------------------- */

/* The index bytes of a step, 4 in the dword of every row. */
INLINE __m512i load_index(const char *step)
{
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    return _mm512_shuffle_epi8(_mm512_loadu_si512(step), order);
}

/* Bits 32 q to 32 q + 31 of the 128 columns that a step's indices can name. A shift by 32 and more gives 0, which takes
 * care of the other columns and of the padding. */
INLINE void mark_step(const char *step, __m512i marks[4])
{
    const __m512i one = _mm512_set1_epi32(1);
    __m512i index = load_index(step);
#pragma GCC unroll 4
    for (int slot = 0; slot < 4; slot++) {
        __m512i column = _mm512_and_si512(_mm512_srli_epi32(index, 8 * slot), _mm512_set1_epi32(255));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            marks[i] = _mm512_or_si512(
                marks[i], _mm512_sllv_epi32(one, _mm512_xor_si512(column, _mm512_set1_epi32(32 * i))));
    }
}

TARGET int64_t srt_avx512_unpack_slot_masks(const srt_source *s, const srt_packed *w, int64_t panel)
{
    const uint8_t *table = (const uint8_t *)srt_masks(w) + panel * w->stride;
    const char *step = srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    __m512i sums = _mm512_setzero_si512(), marks[4] = {sums, sums, sums, sums};
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        __m512i words[16];
        for (int64_t g = 0; g < 8; g++) {
            int64_t window = at / SRT_WINDOW_STEP + g;
            int odd = (int)(g & 1), steps = window < w->stride ? table[window] : 0;
            for (int i = 0; i < steps; i++, step += SRT_SLOT_STEP_BYTES)
                mark_step(step, marks);
            for (int half = 0; half < 2; half++) {
                words[2 * g + half] = marks[2 * odd + half];
                sums = _mm512_add_epi32(sums, _mm512_popcnt_epi32(words[2 * g + half]));
                marks[2 * odd + half] = _mm512_setzero_si512();
            }
        }
        transpose(words);
        store_lines(s, panel, at, words);
    }
    return _mm512_reduce_add_epi32(sums);
}

/* The kept values of `steps` <= BATCH steps behind those of every row. `whole`: no row ends within 128 elements. */
INLINE void unpack_batch(const char *step, int64_t steps, char **to, int whole)
{
    _Alignas(64) uint64_t kept[16];
    __m512i v[16];
#pragma GCC unroll 16
    for (int k = 0; k < BATCH; k++)
        v[k] = k < steps ? load_index(step + k * SRT_SLOT_STEP_BYTES) : padding();
    transpose(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        kept[r] = ~_mm512_movepi8_mask(v[r]); /* SRT_SLOT_PADDING is the highest bit */
    for (int half = 0; half < 2; half++) {
        const char *from = step + 8 * half * SRT_SLOT_STEP_BYTES + 64;
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            v[k] = 8 * half + k / 2 < steps
                       ? _mm512_loadu_si512(from + k / 2 * SRT_SLOT_STEP_BYTES + k % 2 * 64)
                       : _mm512_setzero_si512();
        transpose(v);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            uint32_t mask = (uint32_t)(kept[r] >> 32 * half);
            __m512i values = compress_words(mask, v[r]);
            if (whole)
                _mm512_storeu_si512(to[r], values);
            else
                store_first(to[r], popcount(mask), values, 2);
            to[r] += 2 * popcount(mask);
        }
    }
}

TARGET void srt_avx512_unpack_slots(const srt_source *s, const srt_packed *w, int64_t panel)
{
    const char *step = srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    int64_t steps = srt_offsets(w)[panel + 1] - srt_offsets(w)[panel];
    char *to[17], *ends[16];
    find_rows(s, panel, to);
    memcpy(ends, to + 1, sizeof ends);
    for (; steps > 0; steps -= BATCH, step += BATCH * SRT_SLOT_STEP_BYTES) {
        int64_t least = ends[0] - to[0];
        for (int r = 1; r < 16; r++)
            least = srt_min(least, ends[r] - to[r]);
        if (steps >= BATCH && least >= 64 + 128)
            unpack_batch(step, BATCH, to, 1);
        else
            unpack_batch(step, srt_min(steps, BATCH), to, 0);
    }
}
#endif
