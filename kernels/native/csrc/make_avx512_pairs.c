/* The maker of `pairs` for AVX-512: a pair of values, or the nibbles of 8 groups, is a dword, so the layout is the
 * canonical tensors with rows and columns of 16 x 16 dwords exchanged. */
#include "make_avx512.h"

#if defined(__x86_64__)

/* 64 rows x 512 columns at a time: 32 KB of values and whole cache lines of metadata. */
enum { GROUPS = SRT_LINE_COLUMNS / 4, BLOCKS = GROUPS / SRT_PAIR_BLOCK, LINES = GROUPS / 16 };

/* 16 rows of one unit from a group on. */
typedef struct {
    char *meta, *values, *block; /* block: with the lines of these rows at its begin */
    int64_t meta_stride, values_stride, rows, groups; /* groups: up to the end of the row */
    int64_t blocks;
} part;

INLINE part part_of(const srt_source *s, const srt_packed *w, int64_t unit, int64_t panel, int64_t group)
{
    int64_t row = unit * 64 + panel * 16, groups = s->n / 4, blocks = w->stride / SRT_PAIR_BLOCK;
    int64_t block = group / SRT_PAIR_BLOCK;
    return (part){.meta = (char *)s->meta + row * srt_meta_stride(s) + group / 2,
                  .values = (char *)s->values + (row * groups + group) * 4,
                  .block = (char *)srt_data(w) + (unit * blocks + block) * SRT_PAIR_BLOCK_BYTES + 64 * panel,
                  .meta_stride = srt_meta_stride(s),
                  .values_stride = groups * 4,
                  .rows = s->m - row,
                  .groups = groups - group,
                  .blocks = blocks - block};
}

/* Where dword j of the rows lies: nibbles (block j), or pairs (group j). */
INLINE char *nibble_line_of(const part *p, int64_t j) { return p->block + j * SRT_PAIR_BLOCK_BYTES; }
INLINE char *pair_line_of(const part *p, int64_t j)
{
    return p->block + j / SRT_PAIR_BLOCK * SRT_PAIR_BLOCK_BYTES + 256 * (1 + j % SRT_PAIR_BLOCK);
}

INLINE __mmask64 nibble_bytes(const part *p) { return srt_low_bits(srt_min(64, (p->groups + 1) / 2)); }
INLINE __mmask64 pair_bytes(const part *p, int64_t line)
{
    return srt_low_bits(srt_min(64, 4 * (p->groups - 16 * line)));
}

INLINE void load_rows(const part *p, const char *from, int64_t stride, __mmask64 bytes, __m512i v[16])
{
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        v[r] = _mm512_maskz_loadu_epi8(r < p->rows ? bytes : 0, from + r * stride);
}

INLINE void store_rows(const part *p, char *to, int64_t stride, __mmask64 bytes, const __m512i v[16])
{
    if (p->rows >= 16 && bytes == ~(__mmask64)0)
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            _mm512_storeu_si512(to + r * stride, v[r]);
    else
        for (int r = 0; r < srt_min(p->rows, 16); r++)
            _mm512_mask_storeu_epi8(to + r * stride, bytes, v[r]);
}

INLINE void pack_part(const part *p)
{
    __m512i v[16];
    load_rows(p, p->meta, p->meta_stride, nibble_bytes(p), v);
    transpose(v);
    for (int64_t j = 0; j < srt_min(BLOCKS, p->blocks); j++)
        put_line(nibble_line_of(p, j), v[j]);
    for (int64_t line = 0; line < LINES && 16 * line < p->groups; line++) {
        load_rows(p, p->values + 64 * line, p->values_stride, pair_bytes(p, line), v);
        transpose(v);
        int64_t room = (p->blocks - 2 * line) * SRT_PAIR_BLOCK;
#pragma GCC unroll 16
        for (int64_t j = 0; j < 16; j++)
            if (j < room)
                put_line(pair_line_of(p, 16 * line + j), v[j]);
    }
}

INLINE void unpack_part(const part *p)
{
    __m512i v[16];
    for (int64_t j = 0; j < BLOCKS; j++)
        v[j] = j < p->blocks ? _mm512_loadu_si512(nibble_line_of(p, j)) : _mm512_setzero_si512();
    transpose(v);
    store_rows(p, p->meta, p->meta_stride, nibble_bytes(p), v);
    for (int64_t line = 0; line < LINES && 16 * line < p->groups; line++) {
        int64_t room = (p->blocks - 2 * line) * SRT_PAIR_BLOCK;
#pragma GCC unroll 16
        for (int64_t j = 0; j < 16; j++)
            v[j] = j < room ? _mm512_loadu_si512(pair_line_of(p, 16 * line + j)) : _mm512_setzero_si512();
        transpose(v);
        store_rows(p, p->values + 64 * line, p->values_stride, pair_bytes(p, line), v);
    }
}

TARGET void srt_avx512_pack_pairs(const srt_source *s, srt_packed *w, int64_t unit)
{
    for (int64_t group = 0; group < s->n / 4; group += GROUPS)
        for (int64_t panel = 0; panel < SRT_PAIR_PANELS; panel++) {
            part p = part_of(s, w, unit, panel, group);
            pack_part(&p);
        }
    _mm_sfence();
}

TARGET void srt_avx512_unpack_pairs(const srt_source *s, const srt_packed *w, int64_t unit)
{
    for (int64_t group = 0; group < s->n / 4; group += GROUPS)
        for (int64_t panel = 0; panel < SRT_PAIR_PANELS; panel++) {
            part p = part_of(s, w, unit, panel, group);
            unpack_part(&p);
        }
}
#endif
