/* What the files of AVX-512 makers share. */
#ifndef SPARSE_RT_MAKE_AVX512_H
#define SPARSE_RT_MAKE_AVX512_H

#include "avx512.h"
#include "packed_make.h"

#if defined(__x86_64__)

enum { SRT_LINE_COLUMNS = 512 }; /* columns whose bitmask fills a vector */

/* A whole cache line, past the caches where it is aligned to one: what is packed is not read soon. Fence later. */
INLINE void put_line(char *to, __m512i line)
{
    if ((uintptr_t)to % 64 == 0)
        _mm512_stream_si512((void *)to, line);
    else
        _mm512_storeu_si512(to, line);
}

/* Lane i of a vector of 2:4 metadata: the mask of its 8 columns. */
INLINE __m512i nibble_line(__m512i line)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
    const __m512i low = _mm512_set1_epi8(15);
    __m512i first = _mm512_shuffle_epi8(table, _mm512_and_si512(line, low));
    __m512i second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(line, 4), low));
    return _mm512_or_si512(first, _mm512_slli_epi16(second, 4)); /* 4 bits: none leaves its byte */
}

/* Byte lanes of the metadata of the columns [at, at + 512). */
INLINE __mmask64 line_bytes(const srt_source *s, int64_t at) { return srt_low_bits(srt_min(64, (s->n - at + 7) / 8)); }

/* The bitmasks of 512 columns of the 16 rows of a panel; nothing but zeros behind the last row and the last column. */
INLINE void load_lines(const srt_source *s, int64_t panel, int64_t at, __m512i lines[16])
{
    const uint8_t *meta = s->meta + panel * SRT_PANEL * srt_meta_stride(s) + at / 8;
    int64_t rows = srt_panel_rows(s, panel), stride = srt_meta_stride(s);
    __mmask64 bytes = line_bytes(s, at);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        lines[r] = _mm512_maskz_loadu_epi8(r < rows ? bytes : 0, meta + r * stride);
    if (s->nibbles)
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            lines[r] = _mm512_maskz_mov_epi8(r < rows ? bytes : 0, nibble_line(lines[r]));
    if (s->n - at < SRT_LINE_COLUMNS && s->n % 8) {
        /* padding in the last byte */
        __mmask64 last = bytes & ~(bytes >> 1);
        __m512i keep = _mm512_mask_set1_epi8(_mm512_set1_epi8(-1), last, (char)srt_low_bits(s->n % 8));
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            lines[r] = _mm512_and_si512(lines[r], keep);
    }
}

/* The inverse of nibble_line. */
INLINE __m512i mask_line(__m512i line)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0));
    const __m512i low = _mm512_set1_epi8(15);
    __m512i first = _mm512_shuffle_epi8(table, _mm512_and_si512(line, low));
    __m512i second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(line, 4), low));
    return _mm512_or_si512(first, _mm512_slli_epi16(second, 4));
}

/* The inverse of load_lines. */
INLINE void store_lines(const srt_source *s, int64_t panel, int64_t at, const __m512i lines[16])
{
    uint8_t *meta = (uint8_t *)s->meta + panel * SRT_PANEL * srt_meta_stride(s) + at / 8;
    for (int r = 0; r < srt_panel_rows(s, panel); r++, meta += srt_meta_stride(s))
        _mm512_mask_storeu_epi8(meta, line_bytes(s, at), s->nibbles ? mask_line(lines[r]) : lines[r]);
}

/* Kept elements of the 16 rows of a panel. */
void srt_avx512_row_counts(const srt_source *s, int64_t panel, int64_t counts[16]);

/* Where the canonical values of the rows of a panel begin; [16] is where the panel ends. */
INLINE void find_rows(const srt_source *s, int64_t panel, char *rows[17])
{
    int64_t counts[16];
    srt_avx512_row_counts(s, panel, counts);
    rows[0] = (char *)s->values + s->starts[panel] * s->size;
    for (int r = 0; r < 16; r++)
        rows[r + 1] = rows[r] + counts[r] * s->size;
}

void srt_avx512_pack_slots(const srt_source *s, srt_packed *w, int64_t panel);
int64_t srt_avx512_count_steps(const srt_source *s, int64_t panel);
int64_t srt_avx512_unpack_slot_masks(const srt_source *s, const srt_packed *w, int64_t panel);
void srt_avx512_unpack_slots(const srt_source *s, const srt_packed *w, int64_t panel);
void srt_avx512_pack_pairs(const srt_source *s, srt_packed *w, int64_t unit);
void srt_avx512_unpack_pairs(const srt_source *s, const srt_packed *w, int64_t unit);

#endif
#endif
