/* Canonical values and metadata -> packed weight, and back. The layouts are described in packed.h. */
#include <string.h>

#include "packed.h"
#include "packed_make.h"
#include "parallel.h"
#include "rows.h"

enum { ALIGN = 64, LOADS_BEHIND = 64 }; /* kernels load whole vectors behind the last element */

/* ---- canonical metadata --------------------------------------------------------------------------------------- */

/* Entry i: the mask of a group of 4 whose kept columns are i & 3 and i >> 2. */
static const uint8_t nibble_masks[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};

/* The mask of the columns [at, at + 64) of a row; `at` is a multiple of 64. */
static uint64_t mask_word(const srt_source *s, int64_t row, int64_t at)
{
    const uint8_t *meta = s->meta + row * ((s->n + 7) / 8);
    uint64_t word = srt_mask_word(meta, at, s->n);
    if (!s->nibbles)
        return word;
    uint64_t mask = 0;
    for (int64_t g = 0; g < 16 && at + 4 * g < s->n; g++)
        mask |= (uint64_t)nibble_masks[word >> (4 * g) & 15] << (4 * g);
    return mask;
}

static int64_t row_count(const srt_source *s, int64_t row)
{
    int64_t kept = 0;
    for (int64_t at = 0; at < s->n; at += 64)
        kept += __builtin_popcountll(mask_word(s, row, at));
    return kept;
}

static int64_t panel_last(const srt_source *s, int64_t panel) { return srt_min(s->m, (panel + 1) * SRT_PANEL); }

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
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++)
        words[row % SRT_PANEL] = (uint32_t)(mask_word(s, row, at & ~(int64_t)63) >> (at & 32));
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

static int64_t vectors(int64_t n, int size) { return size == 2 ? srt_divide_up(n, 2) : n; }

static void put_mask(char *masks, int64_t at, uint32_t mask, int size)
{
    uint16_t narrow = (uint16_t)mask;
    if (size == 2)
        memcpy(masks + at * 4, &mask, 4);
    else
        memcpy(masks + at * 2, &narrow, 2);
}

static uint32_t get_mask(const srt_packed *w, int64_t at)
{
    uint32_t mask;
    uint16_t narrow;
    if (w->dtype != SRT_FP32)
        return memcpy(&mask, srt_masks(w) + at * 4, 4), mask;
    return memcpy(&narrow, srt_masks(w) + at * 2, 2), narrow;
}

static void pack_bitmask(const srt_source *s, srt_packed *w, int64_t panel)
{
    const char *from[SRT_PANEL];
    int64_t start = s->starts[panel], row_bits = s->size == 2 ? 1 : 0;
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++) {
        from[row % SRT_PANEL] = s->values + start * s->size;
        start += row_count(s, row);
    }
    char *to = (char *)srt_data(w) + s->starts[panel] * s->size;
    char *table = (char *)srt_masks(w);
    for (int64_t at = 0, v = panel * w->stride; at < s->n; at += 32) {
        uint32_t masks[32];
        vector_masks(s, panel, at, masks);
        int64_t count = srt_min(vectors(s->n, s->size) - vectors(at, s->size), s->size == 2 ? 16 : 32);
        for (int64_t k = 0; k < count; k++, v++) {
            put_mask(table, v, masks[k], s->size);
            for (uint32_t left = masks[k]; left; left &= left - 1, to += s->size) {
                int row = __builtin_ctz(left) >> row_bits;
                memcpy(to, from[row], s->size == 2 ? 2 : 4);
                from[row] += s->size;
            }
        }
    }
}

static void unpack_bitmask(const srt_source *s, const srt_packed *w, int64_t panel)
{
    char *to[SRT_PANEL];
    int64_t start = s->starts[panel], row_bits = s->size == 2 ? 1 : 0;
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++) {
        to[row % SRT_PANEL] = (char *)s->values + start * s->size;
        for (int64_t v = 0; v < w->stride; v++) /* rows follow each other in the canonical values: count this one */
            start += __builtin_popcount(get_mask(w, panel * w->stride + v) &
                                        (row_bits ? 3u << 2 * (row % SRT_PANEL) : 1u << row % SRT_PANEL));
    }
    const char *from = srt_data(w) + srt_offsets(w)[panel] * s->size;
    for (int64_t v = 0; v < w->stride; v++)
        for (uint32_t left = get_mask(w, panel * w->stride + v); left; left &= left - 1, from += s->size) {
            int bit = __builtin_ctz(left), row = bit >> row_bits;
            srt_mark(s, panel * SRT_PANEL + row, row_bits ? 2 * v + (bit & 1) : v);
            memcpy(to[row], from, s->size == 2 ? 2 : 4);
            to[row] += s->size;
        }
}

/* ---- 2:4 ------------------------------------------------------------------------------------------------------ */

enum { PAIR_BLOCK_BYTES = SRT_PAIR_PANELS * 64 * (1 + SRT_PAIR_BLOCK) };

/* A block holds 8 groups of 64 rows: the nibbles of a row are the 4 bytes of the metadata as they are, a vector of values
 * is one pair of each row. */
static void move_pairs(const srt_source *s, srt_packed *w, int64_t unit, int back)
{
    char *block = (char *)srt_data(w) + unit * (w->stride / SRT_PAIR_BLOCK) * PAIR_BLOCK_BYTES;
    int64_t groups = s->n / 4, meta_stride = (s->n + 7) / 8, first = unit * 64;
    for (int64_t g = 0; g < groups; g += SRT_PAIR_BLOCK, block += PAIR_BLOCK_BYTES) {
        int64_t count = srt_min(groups - g, SRT_PAIR_BLOCK);
        for (int64_t r = 0; r < srt_min(64, s->m - first); r++) {
            char *index = block + 4 * r, *pairs = block + 4 * 64 + 4 * r;
            char *meta = (char *)s->meta + (first + r) * meta_stride + g / 2;
            char *values = (char *)s->values + ((first + r) * groups + g) * 4;
            if (back) {
                memcpy(meta, index, (size_t)(count + 1) / 2);
                for (int64_t k = 0; k < count; k++)
                    memcpy(values + 4 * k, pairs + 256 * k, 4);
            } else {
                memcpy(index, meta, (size_t)(count + 1) / 2);
                for (int64_t k = 0; k < count; k++)
                    memcpy(pairs + 256 * k, values + 4 * k, 4);
            }
        }
    }
}

/* ---- slots ---------------------------------------------------------------------------------------------------- */

/* Where slot 0..3 of row r lies in a step: its index byte, and its word in the two vectors of values behind them. The
 * order is that of VPUNPCKLBW and VPUNPCKHBW on the gathered bytes. */
static int slot_index(int r, int slot) { return (r / 4) * 16 + 2 * (r % 4) + (slot & 1) + (slot & 2) * 4; }
static int slot_value(int r, int slot) { return 64 + (slot & 2) * 32 + 4 * r + 2 * (slot & 1); }

/* How far the rows of a panel have come. */
typedef struct {
    int64_t emitted[SRT_PANEL], due[SRT_PANEL], open[SRT_PANEL]; /* counts: written; before the next window; in this one */
} progress;

/* Steps of window g: every element in front of the next window (column 64 (g + 1)) must be written by its end, and rows
 * that are ahead fill up with elements as far as the window reaches (column 64 g + 128). */
static int window_steps(const srt_source *s, int64_t panel, int64_t g, progress *p)
{
    int64_t most = 0;
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++) {
        int r = (int)(row % SRT_PANEL);
        if (g == 0)
            p->open[r] = __builtin_popcountll(mask_word(s, row, 0));
        p->due[r] = p->open[r];
        if (64 * (g + 1) < s->n)
            p->open[r] += __builtin_popcountll(mask_word(s, row, 64 * (g + 1)));
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

static int64_t plan_slots(const srt_source *s, int64_t panel)
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

static void pack_slots(const srt_source *s, srt_packed *w, int64_t panel)
{
    struct { const char *values; uint64_t word; int64_t at; } rows[SRT_PANEL];
    int64_t start = s->starts[panel];
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++) {
        int r = (int)(row % SRT_PANEL);
        rows[r].values = s->values + 2 * start, rows[r].word = mask_word(s, row, 0), rows[r].at = 0;
        start += row_count(s, row);
    }
    uint8_t *table = (uint8_t *)srt_masks(w) + panel * w->stride;
    char *step = (char *)srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    progress p = {0};
    for (int64_t g = 0; g < srt_divide_up(s->n, SRT_WINDOW_STEP); g++) {
        int steps = window_steps(s, panel, g, &p);
        table[g] = (uint8_t)steps;
        for (int r = 0; r < SRT_PANEL; r++) {
            int64_t count = srt_min(4 * steps, p.open[r] - p.emitted[r]);
            for (int64_t i = 0; i < 4 * steps; i++) {
                char *to = step + i / 4 * SRT_SLOT_STEP_BYTES;
                uint8_t index = SRT_SLOT_PADDING;
                if (i < count) {
                    while (rows[r].word == 0)
                        rows[r].word = mask_word(s, panel * SRT_PANEL + r, rows[r].at += 64);
                    index = (uint8_t)((rows[r].at + __builtin_ctzll(rows[r].word)) & 127);
                    rows[r].word &= rows[r].word - 1;
                    memcpy(to + slot_value(r, (int)(i % 4)), rows[r].values, 2);
                    rows[r].values += 2;
                } else {
                    memset(to + slot_value(r, (int)(i % 4)), 0, 2);
                }
                to[slot_index(r, (int)(i % 4))] = (char)index;
            }
        }
        advance(&p, steps);
        step += steps * SRT_SLOT_STEP_BYTES;
    }
}

/* Calls visit() for every kept element of row r of a panel, in order of columns. Returns their number. */
static int64_t unpack_slot_row(const srt_source *s, const srt_packed *w, int64_t panel, int r, char *values)
{
    const uint8_t *table = (const uint8_t *)srt_masks(w) + panel * w->stride;
    const char *step = srt_data(w) + srt_offsets(w)[panel] * SRT_SLOT_STEP_BYTES;
    int64_t found = 0;
    for (int64_t g = 0; g < w->stride; g++)
        for (int i = 0; i < table[g] * 4; i++) {
            const char *at = step + i / 4 * SRT_SLOT_STEP_BYTES;
            uint8_t index = (uint8_t)at[slot_index(r, i % 4)];
            if (i == table[g] * 4 - 1)
                step = at + SRT_SLOT_STEP_BYTES;
            if (index & SRT_SLOT_PADDING)
                continue;
            if (values) {
                srt_mark(s, panel * SRT_PANEL + r, 64 * (g + ((index / 64 ^ g) & 1)) + index % 64);
                memcpy(values + 2 * found, at + slot_value(r, i % 4), 2);
            }
            found++;
        }
    return found;
}

static void unpack_slots(const srt_source *s, const srt_packed *w, int64_t panel)
{
    char *values = (char *)s->values + 2 * s->starts[panel];
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++)
        values += 2 * unpack_slot_row(s, w, panel, (int)(row % SRT_PANEL), values);
}

/* ---- plan, pack, unpack --------------------------------------------------------------------------------------- */

typedef struct {
    const srt_source *source;
    srt_packed *packed;
    int64_t *counts, *steps;
    int layout;
} work;

static void count_panel(void *context, int64_t panel)
{
    const work *job = context;
    const srt_source *s = job->source;
    int64_t kept = 0;
    for (int64_t row = panel * SRT_PANEL; row < panel_last(s, panel); row++)
        kept += row_count(s, row);
    job->counts[panel + 1] = kept;
    job->steps[panel + 1] = job->layout == SRT_SLOTS ? plan_slots(s, panel) : kept;
}

static void pack_unit(void *context, int64_t unit)
{
    const work *job = context;
    if (job->layout == SRT_PAIRS)
        move_pairs(job->source, job->packed, unit, 0);
    else
        (job->layout == SRT_SLOTS ? pack_slots : pack_bitmask)(job->source, job->packed, unit);
}

static void unpack_unit(void *context, int64_t unit)
{
    const work *job = context;
    if (job->layout == SRT_PAIRS)
        move_pairs(job->source, job->packed, unit, 1);
    else
        (job->layout == SRT_SLOTS ? unpack_slots : unpack_bitmask)(job->source, job->packed, unit);
}

/* The header of a packed weight whose units have `offsets` (last one: total), all positions and the size included. */
static srt_packed layout_of(int layout, int dtype, const srt_source *s, int64_t total)
{
    srt_packed w = {.magic = "srtpack", .layout = layout, .dtype = dtype, .m = s->m, .n = s->n, .nnz = s->nnz};
    int64_t data, mask_bytes;
    w.units = srt_divide_up(s->m, layout == SRT_PAIRS ? 64 : SRT_PANEL);
    if (layout == SRT_BITMASK) {
        w.stride = srt_round_up(vectors(s->n, s->size), 4);
        mask_bytes = w.units * w.stride * (s->size == 2 ? 4 : 2);
        data = total * s->size;
    } else if (layout == SRT_SLOTS) {
        w.stride = srt_round_up(srt_divide_up(s->n, SRT_WINDOW_STEP), 2);
        mask_bytes = w.units * w.stride;
        data = total * SRT_SLOT_STEP_BYTES;
    } else {
        w.stride = srt_round_up(s->n / 4, SRT_PAIR_BLOCK);
        mask_bytes = 0;
        data = w.units * (w.stride / SRT_PAIR_BLOCK) * PAIR_BLOCK_BYTES;
    }
    w.offsets = srt_round_up(sizeof w, ALIGN);
    w.masks = srt_round_up(w.offsets + (layout == SRT_PAIRS ? 0 : 8 * (w.units + 1)), ALIGN);
    w.data = srt_round_up(w.masks + mask_bytes, ALIGN);
    w.bytes = srt_round_up(w.data + data, ALIGN) + LOADS_BEHIND;
    return w;
}

int64_t srt_plan(int layout, int dtype, const srt_source *s, int64_t *counts, int64_t *steps, int threads,
                 srt_packed *header)
{
    int64_t panels = srt_divide_up(s->m, SRT_PANEL);
    work job = {.source = s, .counts = counts, .steps = steps, .layout = layout};
    counts[0] = steps[0] = 0;
    if (layout == SRT_PAIRS) {
        *header = layout_of(layout, dtype, s, 0);
        return s->m * s->n / 2;
    }
    srt_parallel(threads, panels, count_panel, &job);
    for (int64_t panel = 0; panel < panels; panel++) {
        counts[panel + 1] += counts[panel];
        steps[panel + 1] += steps[panel];
    }
    *header = layout_of(layout, dtype, s, steps[panels]);
    return counts[panels];
}

void srt_make(const srt_source *s, const int64_t *steps, const srt_packed *header, srt_packed *out, int threads)
{
    work job = {.source = s, .packed = out, .layout = header->layout};
    memset(out, 0, (size_t)header->data); /* masks behind the last column stay 0 */
    *out = *header;
    if (header->layout != SRT_PAIRS)
        memcpy((char *)out + out->offsets, steps, (size_t)(8 * (out->units + 1)));
    else
        memset((char *)out + out->data, 0, (size_t)(out->bytes - out->data));
    memset((char *)out + out->bytes - LOADS_BEHIND, 0, LOADS_BEHIND);
    srt_parallel(threads, out->units, pack_unit, &job);
}

/* counts[panel] = first canonical value of a panel. */
static void count_packed(void *context, int64_t panel)
{
    const work *job = context;
    const srt_packed *w = job->packed;
    int64_t kept = 0;
    for (int64_t row = panel * SRT_PANEL; row < srt_min(w->m, (panel + 1) * SRT_PANEL); row++)
        kept += unpack_slot_row(NULL, w, panel, (int)(row % SRT_PANEL), NULL);
    job->counts[panel + 1] = kept;
}

void srt_unmake(const srt_packed *w, srt_source *s, int64_t *counts, int threads)
{
    work job = {.source = s, .packed = (srt_packed *)w, .counts = counts, .layout = w->layout};
    memset((char *)s->meta, 0, (size_t)(s->m * ((s->n + 7) / 8)));
    if (w->layout == SRT_BITMASK)
        memcpy(counts, srt_offsets(w), (size_t)(8 * (w->units + 1)));
    if (w->layout == SRT_SLOTS) {
        counts[0] = 0;
        srt_parallel(threads, w->units, count_packed, &job);
        for (int64_t panel = 0; panel < w->units; panel++)
            counts[panel + 1] += counts[panel];
    }
    s->starts = counts;
    srt_parallel(threads, w->units, unpack_unit, &job);
}
