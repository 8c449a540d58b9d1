/* Canonical values and metadata -> packed weight, and back: sizes, positions and threads. The layouts are described in
 * packed.h, the makers of this processor do the work on one unit. */
#include "packed_make.h"

#include <string.h>

#include "parallel.h"

enum { ALIGN = 64, LOADS_BEHIND = 64 }; /* kernels load whole vectors behind the last element */

typedef struct {
    const srt_maker *maker;
    const srt_source *source;
    srt_packed *packed;
    int64_t *counts, *steps;
    int layout;
} work;

/* The makers follow the row kernels: both move elements and need nothing but the same AVX-512 extensions. */
static const srt_maker *maker(void)
{
#if defined(__x86_64__)
    if (srt_chosen_rows() == &srt_rows_avx512)
        return &srt_maker_avx512;
#endif
    return &srt_maker_scalar;
}

static int64_t add_up(int64_t *counts, int64_t panels)
{
    for (int64_t panel = 0; panel < panels; panel++)
        counts[panel + 1] += counts[panel];
    return counts[panels];
}

/* ---- sizes ---------------------------------------------------------------------------------------------------- */

static int64_t mask_bytes(const srt_packed *w)
{
    if (w->layout == SRT_PAIRS)
        return 0;
    return w->units * w->stride * (w->layout == SRT_SLOTS ? 1 : srt_mask_size(srt_element_size(w->dtype)));
}

/* `total`: elements (bitmask) or steps (slots) of all units. */
static int64_t data_bytes(const srt_packed *w, int64_t total)
{
    if (w->layout == SRT_PAIRS)
        return w->units * (w->stride / SRT_PAIR_BLOCK) * SRT_PAIR_BLOCK_BYTES;
    return total * (w->layout == SRT_SLOTS ? SRT_SLOT_STEP_BYTES : srt_element_size(w->dtype));
}

static srt_packed header_of(int layout, int dtype, const srt_source *s, int64_t total)
{
    srt_packed w = {.magic = "srtpack", .layout = layout, .dtype = dtype, .m = s->m, .n = s->n, .nnz = s->nnz,
                    .nibbles = s->nibbles};
    w.units = srt_divide_up(s->m, srt_unit_rows(&w));
    if (layout == SRT_BITMASK)
        w.stride = srt_round_up(srt_vectors(s->n, s->size), 4);
    else if (layout == SRT_SLOTS)
        w.stride = srt_round_up(srt_divide_up(s->n, SRT_WINDOW_STEP), 2);
    else
        w.stride = srt_round_up(s->n / 4, SRT_PAIR_BLOCK);
    w.offsets = srt_round_up(sizeof w, ALIGN);
    w.masks = srt_round_up(w.offsets + (layout == SRT_PAIRS ? 0 : 8 * (w.units + 1)), ALIGN);
    w.data = srt_round_up(w.masks + mask_bytes(&w), ALIGN);
    w.bytes = srt_round_up(w.data + data_bytes(&w, total), ALIGN) + LOADS_BEHIND;
    return w;
}

/* ---- plan ----------------------------------------------------------------------------------------------------- */

static void count_panel(void *context, int64_t panel)
{
    const work *job = context;
    int64_t kept = job->counts[panel + 1] = job->maker->count(job->source, panel);
    job->steps[panel + 1] = job->layout == SRT_SLOTS ? job->maker->count_steps(job->source, panel) : kept;
}

int64_t srt_plan(int layout, int dtype, const srt_source *s, int64_t *counts, int64_t *steps, int threads,
                 srt_packed *header)
{
    int64_t panels = srt_divide_up(s->m, SRT_PANEL);
    work job = {.maker = maker(), .source = s, .counts = counts, .steps = steps, .layout = layout};
    counts[0] = steps[0] = 0;
    if (layout == SRT_PAIRS) {
        *header = header_of(layout, dtype, s, 0);
        return s->m * s->n / 2;
    }
    srt_parallel(threads, panels, count_panel, &job);
    *header = header_of(layout, dtype, s, add_up(steps, panels));
    return add_up(counts, panels);
}

/* ---- make ----------------------------------------------------------------------------------------------------- */

static void pack_unit(void *context, int64_t unit)
{
    const work *job = context;
    job->maker->pack[job->layout](job->source, job->packed, unit);
}

static void clear(srt_packed *w, int64_t from, int64_t to) { memset((char *)w + from, 0, (size_t)(to - from)); }

/* The makers write all tables and data. What lies between is cleared here: equal weights are equal bytes. */
void srt_make(const srt_source *s, const int64_t *steps, const srt_packed *header, srt_packed *out, int threads)
{
    work job = {.maker = maker(), .source = s, .packed = out, .layout = header->layout};
    srt_packed h = *header;
    clear(out, 0, h.masks);
    *out = h;
    if (h.layout != SRT_PAIRS)
        memcpy((char *)out + h.offsets, steps, (size_t)(8 * (h.units + 1)));
    clear(out, h.masks + mask_bytes(&h), h.data);
    clear(out, h.data + data_bytes(&h, h.layout == SRT_PAIRS ? 0 : steps[h.units]), h.bytes);
    srt_parallel(threads, h.units, pack_unit, &job);
}

/* ---- unmake --------------------------------------------------------------------------------------------------- */

static void unpack_panel_masks(void *context, int64_t panel)
{
    const work *job = context;
    job->counts[panel + 1] = job->maker->unpack_slot_masks(job->source, job->packed, panel);
}

static void unpack_unit(void *context, int64_t unit)
{
    const work *job = context;
    job->maker->unpack[job->layout](job->source, job->packed, unit);
}

void srt_unmake(const srt_packed *w, srt_source *s, int64_t *counts, int threads)
{
    work job = {.maker = maker(), .source = s, .packed = (srt_packed *)w, .counts = counts, .layout = w->layout};
    s->starts = counts;
    if (w->layout == SRT_BITMASK)
        memcpy(counts, srt_offsets(w), (size_t)(8 * (w->units + 1)));
    if (w->layout == SRT_SLOTS) {
        counts[0] = 0;
        srt_parallel(threads, w->units, unpack_panel_masks, &job);
        add_up(counts, w->units);
    }
    srt_parallel(threads, w->units, unpack_unit, &job);
}
