/* Between the entries of packed weights (packed.c), the code that plans them (packed_make.c) and the makers of the
 * instruction sets (make_scalar.c, make_avx512*.c), which write the same bytes. */
#ifndef SPARSE_RT_PACKED_MAKE_H
#define SPARSE_RT_PACKED_MAKE_H

#include "packed.h"
#include "rows.h"

enum { SRT_PAIR_BLOCK_BYTES = SRT_PAIR_PANELS * 64 * (1 + SRT_PAIR_BLOCK) };

/* Canonical tensors of an (m, n) weight; `values` and `meta` are written only when a packed weight is undone. */
typedef struct {
    const char *values;
    const uint8_t *meta; /* [m, ceil(n / 8)]: bitmask or nibbles */
    const int64_t *starts; /* [panels + 1]: first value of every 16 rows */
    int64_t m, n, nnz;
    int nibbles, size;
} srt_source;

/* The work on one unit (packed.h). Units are worked on by any thread in any order: nothing outside a unit's own part of
 * the tensors is written. Makers may write past the caches and then fence their stores. */
typedef struct {
    /* Kept elements of a panel, and the steps that it takes in `slots`. */
    int64_t (*count)(const srt_source *s, int64_t panel);
    int64_t (*count_steps)(const srt_source *s, int64_t panel);
    /* [layout]: every byte of a unit's tables and data. */
    void (*pack[3])(const srt_source *s, srt_packed *w, int64_t unit);
    /* Writes the metadata of a panel of `slots` and returns its kept elements; unpack() is called when all panels are
     * done. The two other layouts write metadata in unpack(). */
    int64_t (*unpack_slot_masks)(const srt_source *s, const srt_packed *w, int64_t panel);
    void (*unpack[3])(const srt_source *s, const srt_packed *w, int64_t unit);
} srt_maker;

extern const srt_maker srt_maker_scalar;
#if defined(__x86_64__)
extern const srt_maker srt_maker_avx512;
#endif

static inline int64_t srt_meta_stride(const srt_source *s) { return (s->n + 7) / 8; }
static inline int64_t srt_panel_rows(const srt_source *s, int64_t panel)
{
    return srt_min(s->m - panel * SRT_PANEL, SRT_PANEL);
}
/* Vectors of a panel of `bitmask`, and the bytes of their masks. */
static inline int64_t srt_vectors(int64_t n, int size) { return size == 2 ? srt_divide_up(n, 2) : n; }
static inline int64_t srt_mask_size(int size) { return size == 2 ? 4 : 2; }

/* Fills counts and steps [panels + 1] with running sums and the header; returns the number of kept elements. */
int64_t srt_plan(int layout, int dtype, const srt_source *s, int64_t *counts, int64_t *steps, int threads,
                 srt_packed *header);
/* out (header->bytes) from the canonical tensors. */
void srt_make(const srt_source *s, const int64_t *steps, const srt_packed *header, srt_packed *out, int threads);
/* The canonical tensors from a packed weight; counts is room for [panels + 1]. */
void srt_unmake(const srt_packed *w, srt_source *s, int64_t *counts, int threads);

#endif
