/* The makers of packed weights in portable C. */
#include <string.h>

#include "packed_make.h"

/* ---- canonical metadata --------------------------------------------------------------------------------------- */

/* Entry i: the mask of a group of 4 whose kept columns are i & 3 and i >> 2. */
static const uint8_t nibble_masks[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};

/* The mask of the columns [at, at + 64) of row r of a panel; `at` is a multiple of 64. */
static uint64_t mask_word(const srt_source *s, int64_t panel, int64_t r, int64_t at)
{
    uint64_t word = srt_mask_word(s->meta + (panel * SRT_PANEL + r) * srt_meta_stride(s), at, s->n);
    if (!s->nibbles)
        return word;
    uint64_t mask = 0;
    for (int64_t g = 0; g < 16 && at + 4 * g < s->n; g++)
        mask |= (uint64_t)nibble_masks[word >> (4 * g) & 15] << (4 * g);
    return mask;
}

static int64_t row_count(const srt_source *s, int64_t panel, int64_t r)
{
    int64_t kept = 0;
    for (int64_t at = 0; at < s->n; at += 64)
        kept += __builtin_popcountll(mask_word(s, panel, r, at));
    return kept;
}

static int64_t count(const srt_source *s, int64_t panel)
{
    int64_t kept = 0;
    for (int64_t r = 0; r < srt_panel_rows(s, panel); r++)
        kept += row_count(s, panel, r);
    return kept;
}

/* Where the canonical values of the rows of a panel begin. */
static void find_rows(const srt_source *s, int64_t panel, char *rows[SRT_PANEL])
{
    char *values = (char *)s->values + s->starts[panel] * s->size;
    for (int64_t r = 0; r < srt_panel_rows(s, panel); r++) {
        rows[r] = values;
        values += row_count(s, panel, r) * s->size;
    }
}

static void clear_meta(const srt_source *s, int64_t panel)
{
    memset((uint8_t *)s->meta + panel * SRT_PANEL * srt_meta_stride(s), 0,
           (size_t)(srt_panel_rows(s, panel) * srt_meta_stride(s)));
}

/* The bitmask that was marked in a panel becomes 2:4 nibbles where those are the canonical metadata. */
static void finish_meta(const srt_source *s, int64_t panel)
{
    static const uint8_t nibbles[16] = {[3] = 4, [5] = 8, [6] = 9, [9] = 12, [10] = 13, [12] = 14};
    uint8_t *meta = (uint8_t *)s->meta + panel * SRT_PANEL * srt_meta_stride(s);
    for (int64_t i = 0; s->nibbles && i < srt_panel_rows(s, panel) * srt_meta_stride(s); i++)
        meta[i] = (uint8_t)(nibbles[meta[i] & 15] | nibbles[meta[i] >> 4] << 4);
}

static void mark(const srt_source *s, int64_t panel, int64_t r, int64_t column)
{
    ((uint8_t *)s->meta)[(panel * SRT_PANEL + r) * srt_meta_stride(s) + column / 8] |= (uint8_t)(1 << column % 8);
}

/* ---- bitmask -------------------------------------------------------------------------------------------------- */

/* Exchanges rows and columns of 16 x 16 two-bit elements: bits (2j, 2j + 1) of word i and (2i, 2i + 1) of word j. */
static void transpose_pairs(uint32_t words[16])
{
    static const uint32_t keep[4] = {0x0000ffff, 0x00ff00ff, 0x0f0f0f0f, 0x33333333};
    for (int stage = 0; stage < 4; stage++) {
        int far = 8 >> stage, shift = 16 >> stage;
        for (int i = 0; i < 16; i++) {
            if (i & far)
                continue;
            uint32_t swap = (words[i] >> shift ^ words[i + far]) & keep[stage];
            words[i + far] ^= swap;
            words[i] ^= swap << shift;
        }
    }
}

/* Masks of the vectors that the 32 columns behind `at` make: 16 of 16 rows x 2 columns, or 32 of 16 rows. */
static void vector_masks(const srt_source *s, int64_t panel, int64_t at, uint32_t masks[32])
{
    uint32_t words[16] = {0};
    for (int64_t r = 0; r < srt_panel_rows(s, panel); r++)
        words[r] = (uint32_t)(mask_word(s, panel, r, at & ~(int64_t)63) >> (at & 32));
    if (s->size == 2) {
        transpose_pairs(words);
        memcpy(masks, words, sizeof words);
        return;
    }
    for (int c = 0; c < 32; c++) {
        masks[c] = 0;
        for (int i = 0; i < 16; i++)
            masks[c] |= (words[i] >> c & 1) << i;
    }
}

static void put_mask(char *masks, int64_t at, uint32_t mask, int size)
{
    uint16_t narrow = (uint16_t)mask;
    if (size == 2)
        memcpy(masks + at * 4, &mask, 4);
    else
        memcpy(masks + at * 2, &narrow, 2);
}

static uint32_t get_mask(const char *masks, int64_t at, int size)
{
    uint32_t mask;
    uint16_t narrow;
    if (size == 2) {
        memcpy(&mask, masks + at * 4, 4);
        return mask;
    }
    memcpy(&narrow, masks + at * 2, 2);
    return narrow;
}

static void pack_bitmask(const srt_source *s, srt_packed *w, int64_t panel)
{
    char *from[SRT_PANEL], *to = (char *)srt_data(w) + s->starts[panel] * s->size;
    char *table = (char *)srt_masks(w) + panel * w->stride * srt_mask_size(s->size);
    int row_bits = s->size == 2 ? 1 : 0;
    find_rows(s, panel, from);
    memset(table, 0, (size_t)(w->stride * srt_mask_size(s->size)));
    for (int64_t at = 0, v = 0; at < s->n; at += 32) {
        uint32_t masks[32];
        vector_masks(s, panel, at, masks);
        int64_t last = srt_vectors(srt_min(at + 32, s->n), s->size);
        for (int64_t first = v; v < last; v++) {
            put_mask(table, v, masks[v - first], s->size);
            for (uint32_t left = masks[v - first]; left; left &= left - 1, to += s->size) {
                int row = __builtin_ctz(left) >> row_bits;
                memcpy(to, from[row], s->size == 2 ? 2 : 4);
                from[row] += s->size;
            }
        }
    }
}

static void unpack_bitmask(const srt_source *s, const srt_packed *w, int64_t panel)
{
    const char *from = srt_data(w) + srt_offsets(w)[panel] * s->size;
    const char *table = srt_masks(w) + panel * w->stride * srt_mask_size(s->size);
    int row_bits = s->size == 2 ? 1 : 0;
    char *to[SRT_PANEL];
    clear_meta(s, panel);
    for (int64_t v = 0; v < srt_vectors(s->n, s->size); v++)
        for (uint32_t left = get_mask(table, v, s->size); left; left &= left - 1) {
            int bit = __builtin_ctz(left);
            mark(s, panel, bit >> row_bits, row_bits ? 2 * v + (bit & 1) : v);
        }
    finish_meta(s, panel);
    find_rows(s, panel, to);
    for (int64_t v = 0; v < srt_vectors(s->n, s->size); v++)
        for (uint32_t left = get_mask(table, v, s->size); left; left &= left - 1, from += s->size) {
            int row = __builtin_ctz(left) >> row_bits;
            memcpy(to[row], from, s->size == 2 ? 2 : 4);
            to[row] += s->size;
        }
}

/* ---- 2:4 ------------------------------------------------------------------------------------------------------ */

/* A block holds 8 groups of 64 rows: the nibbles of a row are the 4 bytes of the metadata as they are, a vector of
 * values is one pair of each row. */
static void move_pairs(const srt_source *s, const srt_packed *w, int64_t unit, int back)
{
    char *block = (char *)srt_data(w) + unit * (w->stride / SRT_PAIR_BLOCK) * SRT_PAIR_BLOCK_BYTES;
    int64_t groups = s->n / 4, first = unit * 64;
    for (int64_t g = 0; g < groups; g += SRT_PAIR_BLOCK, block += SRT_PAIR_BLOCK_BYTES) {
        int64_t count = srt_min(groups - g, SRT_PAIR_BLOCK);
        if (!back)
            memset(block, 0, SRT_PAIR_BLOCK_BYTES);
        for (int64_t r = 0; r < srt_min(64, s->m - first); r++) {
            char *index = block + 4 * r, *pairs = block + 4 * 64 + 4 * r;
            char *meta = (char *)s->meta + (first + r) * srt_meta_stride(s) + g / 2;
            char *values = (char *)s->values + ((first + r) * groups + g) * 4;
            memcpy(back ? meta : index, back ? index : meta, (size_t)(count + 1) / 2);
            for (int64_t k = 0; k < count; k++)
                memcpy(back ? values + 4 * k : pairs + 256 * k, back ? pairs + 256 * k : values + 4 * k, 4);
        }
    }
}

static void pack_pairs(const srt_source *s, srt_packed *w, int64_t unit) { move_pairs(s, w, unit, 0); }
static void unpack_pairs(const srt_source *s, const srt_packed *w, int64_t unit) { move_pairs(s, w, unit, 1); }

/* ---- slots ---------------------------------------------------------------------------------------------------- */

/* Where slot 0..3 of row r lies in a step: its index byte, and its word in the two vectors of values behind them. The
 * order is that of VPUNPCKLBW and VPUNPCKHBW on the gathered bytes. */
static int slot_index(int r, int slot) { return (r / 4) * 16 + 2 * (r % 4) + (slot & 1) + (slot & 2) * 4; }
static int slot_value(int r, int slot) { return 64 + (slot & 2) * 32 + 4 * r + 2 * (slot & 1); }

/* How far the rows of a panel have come. */
typedef struct {
    int64_t emitted[SRT_PANEL], due[SRT_PANEL], open[SRT_PANEL]; /* written; before the next window; in this one */
} progress;

/* Steps of window g: every element in front of the next window (column 64 (g + 1)) must be written by its end, and rows
 * that are ahead fill up with elements as far as the window reaches (column 64 g + 128). */
static int window_steps(const srt_source *s, int64_t panel, int64_t g, progress *p)
{
    int64_t most = 0;
    for (int64_t r = 0; r < srt_panel_rows(s, panel); r++) {
        if (g == 0)
            p->open[r] = __builtin_popcountll(mask_word(s, panel, r, 0));
        p->due[r] = p->open[r];
        if (64 * (g + 1) < s->n)
            p->open[r] += __builtin_popcountll(mask_word(s, panel, r, 64 * (g + 1)));
        if (p->due[r] - p->emitted[r] > most)
            most = p->due[r] - p->emitted[r];
    }
    return (int)srt_divide_up(most, 4);
}

static void advance(progress *p, int steps)
{
    for (int r = 0; r < SRT_PANEL; r++)
        p->emitted[r] = srt_min(p->emitted[r] + 4 * steps, p->open[r]);
}

static int64_t count_steps(const srt_source *s, int64_t panel)
{
    progress p = {0};
    int64_t total = 0;
    for (int64_t g = 0; g < srt_divide_up(s->n, SRT_WINDOW_STEP); g++) {
        int steps = window_steps(s, panel, g, &p);
        advance(&p, steps);
        total += steps;
    }
    return total;
}

/* A row that is being written: its next value, and the columns [at, at + 64) that are left. */
typedef struct {
    const char *values;
    uint64_t word;
    int64_t at, r;
} slot_row;

/* Writes `count` elements of a row and padding behind them into the steps of a window. */
static void put_row(const srt_source *s, int64_t panel, slot_row *row, int steps, int64_t count, char *step)
{
    for (int i = 0; i < 4 * steps; i++) {
        char *to = step + i / 4 * SRT_SLOT_STEP_BYTES;
        uint8_t index = SRT_SLOT_PADDING;
        if (i < count) {
            while (row->word == 0)
                row->word = mask_word(s, panel, row->r, row->at += 64);
            index = (uint8_t)((row->at + __builtin_ctzll(row->word)) & 127);
            row->word &= row->word - 1;
            memcpy(to + slot_value((int)row->r, i % 4), row->values, 2);
            row->values += 2;
        } else {
            memset(to + slot_value((int)row->r, i % 4), 0, 2);
        }
        to[slot_index((int)row->r, i % 4)] = (char)index;
    }
}

static void pack_slots(const srt_source *s, srt_packed *w, int64_t panel)
{
    slot_row rows[SRT_PANEL] = {{0}};
    char *values[SRT_PANEL] = {0}, *step = (char *)srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    find_rows(s, panel, values);
    for (int64_t r = 0; r < SRT_PANEL; r++)
        rows[r] = (slot_row){values[r], values[r] ? mask_word(s, panel, r, 0) : 0, 0, r};
    uint8_t *table = (uint8_t *)srt_masks(w) + panel * w->stride;
    memset(table, 0, (size_t)w->stride);
    progress p = {0};
    for (int64_t g = 0; g < srt_divide_up(s->n, SRT_WINDOW_STEP); g++) {
        int steps = table[g] = (uint8_t)window_steps(s, panel, g, &p);
        for (int64_t r = 0; r < SRT_PANEL; r++)
            put_row(s, panel, &rows[r], steps, srt_min(4 * steps, p.open[r] - p.emitted[r]), step);
        advance(&p, steps);
        step += steps * SRT_SLOT_STEP_BYTES;
    }
}

static int64_t unpack_slot_masks(const srt_source *s, const srt_packed *w, int64_t panel)
{
    const uint8_t *table = (const uint8_t *)srt_masks(w) + panel * w->stride;
    const char *step = srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    int64_t kept = 0;
    clear_meta(s, panel);
    for (int64_t g = 0; g < w->stride; g++)
        for (int i = 0; i < table[g]; i++, step += SRT_SLOT_STEP_BYTES)
            for (int k = 0; k < 4 * SRT_PANEL; k++) {
                int index = (uint8_t)step[slot_index(k / 4, k % 4)];
                if (index & SRT_SLOT_PADDING)
                    continue;
                mark(s, panel, k / 4, 64 * (g + ((index / 64 ^ g) & 1)) + index % 64);
                kept++;
            }
    finish_meta(s, panel);
    return kept;
}

static void unpack_slots(const srt_source *s, const srt_packed *w, int64_t panel)
{
    const char *step = srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    const char *last = srt_data(w) + srt_offsets(w)[panel + 1] * SRT_SLOT_STEP_BYTES;
    char *to[SRT_PANEL];
    find_rows(s, panel, to);
    for (; step < last; step += SRT_SLOT_STEP_BYTES)
        for (int k = 0; k < 4 * SRT_PANEL; k++)
            if (!(step[slot_index(k / 4, k % 4)] & SRT_SLOT_PADDING)) {
                memcpy(to[k / 4], step + slot_value(k / 4, k % 4), 2);
                to[k / 4] += 2;
            }
}

const srt_maker srt_maker_scalar = {
    .count = count,
    .count_steps = count_steps,
    .pack = {[SRT_BITMASK] = pack_bitmask, [SRT_PAIRS] = pack_pairs, [SRT_SLOTS] = pack_slots},
    .unpack_slot_masks = unpack_slot_masks,
    .unpack = {[SRT_BITMASK] = unpack_bitmask, [SRT_PAIRS] = unpack_pairs, [SRT_SLOTS] = unpack_slots},
};
