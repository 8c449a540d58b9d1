/* The C ABI of packed weights: the instruction set, plan, pack and unpack. The product is in product.c. */
#include "packed.h"

#include <string.h>

#include "export.h"
#include "packed_make.h"
#include "product.h"

/* ---- instruction set ------------------------------------------------------------------------------------------ */

static const srt_tiles *const best_first[] = {
#if defined(__x86_64__)
    &srt_tiles_avx512_bf16,
    &srt_tiles_avx512,
    &srt_tiles_avx2,
#endif
    &srt_tiles_scalar,
};

static const srt_tiles *tiles = &srt_tiles_scalar;

/* Chooses the kernels by name, or with "" the best that this processor runs. 0, or -1 where there are none. */
EXPORT int srt_packed_use_isa(const char *name)
{
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if ((name[0] == '\0' || strcmp(name, best_first[i]->name) == 0) && best_first[i]->supported()) {
            tiles = best_first[i];
            return 0;
        }
    return -1;
}

EXPORT const char *srt_packed_isa(void) { return tiles->name; }

const srt_tiles *srt_chosen_tiles(void) { return tiles; }

__attribute__((constructor)) static void on_load(void) { srt_packed_use_isa(""); }

/* 1 where the chosen instruction set multiplies with this layout. */
EXPORT int srt_packed_runs(int layout, int dtype)
{
    return layout >= 0 && layout < 3 && dtype >= 0 && dtype < 3 && tiles->kernels[layout][dtype].tile != NULL;
}

/* ---- pack ----------------------------------------------------------------------------------------------------- */

static srt_source source_of(const void *values, const void *meta, int nibbles, int64_t m, int64_t n, int64_t nnz,
                            int dtype)
{
    return (srt_source){.values = values, .meta = meta, .m = m, .n = n, .nnz = nnz, .nibbles = nibbles,
                        .size = srt_element_size(dtype)};
}

/* First half: counts and steps are int64 [ceil(m / 16) + 1] each, header is 128 bytes. Returns the number of elements
 * that the metadata keeps, or -1 for arguments that make no sense; the size of the packed weight is in the header. */
EXPORT int64_t srt_packed_plan(int layout, int dtype, const void *meta, int nibbles, int64_t m, int64_t n, int64_t nnz,
                               int64_t *counts, int64_t *steps, void *header, int threads)
{
    if (m < 0 || n < 0 || dtype < 0 || dtype > SRT_FP32 || layout < 0 || layout > SRT_SLOTS ||
        (layout != SRT_BITMASK && dtype != SRT_BF16) || (layout == SRT_PAIRS && !nibbles) || (nibbles && n % 4))
        return -1;
    srt_source s = source_of(NULL, meta, nibbles, m, n, nnz, dtype);
    return srt_plan(layout, dtype, &s, counts, steps, threads, header);
}

EXPORT int64_t srt_packed_bytes(const void *header) { return ((const srt_packed *)header)->bytes; }

/* Second half: out is room for the bytes that the header says; values are the nnz elements that the plan counted. */
EXPORT void srt_packed_make(const void *values, const void *meta, int nibbles, const int64_t *counts,
                            const int64_t *steps, const void *header, void *out, int threads)
{
    const srt_packed *h = header;
    srt_source s = source_of(values, meta, nibbles, h->m, h->n, h->nnz, h->dtype);
    s.starts = counts;
    srt_make(&s, steps, h, out, threads);
}

/* `packed` is a packed (m, n) weight of `bytes` bytes that the chosen instruction set can read: 1 or 0. */
static int valid(const srt_packed *w, int64_t bytes, int64_t m, int64_t n)
{
    return bytes >= (int64_t)sizeof *w && memcmp(w->magic, "srtpack", 8) == 0 && w->bytes == bytes && w->m == m &&
           w->n == n && srt_packed_runs(w->layout, w->dtype);
}

/* Layout and dtype, 16 * layout + dtype, or -1 where the block is not a packed (m, n) weight. */
EXPORT int srt_packed_kind(const void *packed, int64_t bytes, int64_t m, int64_t n)
{
    const srt_packed *w = packed;
    return valid(w, bytes, m, n) ? 16 * w->layout + w->dtype : -1;
}

/* The canonical values [nnz] and metadata [m, ceil(n / 8)] of the kind that was packed; counts is room for int64
 * [ceil(m / 16) + 1]. */
EXPORT int srt_packed_unmake(const void *packed, int64_t bytes, int64_t m, int64_t n, void *values, void *meta,
                             int64_t *counts, int threads)
{
    const srt_packed *w = packed;
    if (!valid(w, bytes, m, n))
        return -1;
    srt_source s = source_of(values, meta, (int)w->nibbles, m, n, w->nnz, w->dtype);
    srt_unmake(w, &s, counts, threads);
    return 0;
}
