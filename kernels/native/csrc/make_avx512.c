/* Makers for AVX-512 with VBMI2: bitmask, and the table of all of them.
 *
 * 16 rows x 32 columns at a time: the kept elements of every row are expanded (VPEXPANDW), rows and columns exchanged
 * in registers, and what the vectors of the layout keep is compressed (VPCOMPRESSW). Back it is the same the other way.
 */
#include "make_avx512.h"

#if defined(__x86_64__)

enum { COLUMNS = 32, AHEAD = 512 }; /* bytes of a row that are asked for in advance */

/* ---- masks ---------------------------------------------------------------------------------------------------- */

TARGET void srt_avx512_row_counts(const srt_source *s, int64_t panel, int64_t counts[16])
{
    __m512i sums[16];
    for (int r = 0; r < 16; r++)
        sums[r] = _mm512_setzero_si512();
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        __m512i lines[16];
        load_lines(s, panel, at, lines);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            sums[r] = _mm512_add_epi64(sums[r], _mm512_popcnt_epi64(lines[r]));
    }
    for (int r = 0; r < 16; r++)
        counts[r] = _mm512_reduce_add_epi64(sums[r]);
}

TARGET static int64_t count(const srt_source *s, int64_t panel)
{
    int64_t counts[16], kept = 0;
    srt_avx512_row_counts(s, panel, counts);
    for (int r = 0; r < 16; r++)
        kept += counts[r];
    return kept;
}

/* 16 words of 16 two-bit elements whose rows and columns are to be exchanged: both halves of a word, doubled. */
typedef struct {
    __m512i half[2];
} pair_words;

INLINE pair_words double_halves(__m512i words)
{
    __m512i high = _mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000));
    __m512i low = _mm512_slli_epi32(words, 16);
    return (pair_words){{_mm512_or_si512(low, _mm512_srli_epi32(low, 16)),
                         _mm512_or_si512(high, _mm512_srli_epi32(high, 16))}};
}

/* Bits (2i, 2i + 1) are bits (2j, 2j + 1) of word i. */
INLINE __mmask32 pair_column(const pair_words *words, int j)
{
    const __m512i bits = _mm512_set1_epi32((int)(1u << 2 * (j % 8) | 2u << (2 * (j % 8) + 16)));
    __mmask32 mask = _mm512_test_epi16_mask(words->half[j / 8], bits);
    __asm__("" : "+Yk"(mask)); /* else it takes a way through a general register to what it masks: 2 cycles */
    return mask;
}

/* ---- pack ----------------------------------------------------------------------------------------------------- */

/* The kept elements of a panel, which begin and end anywhere in a cache line. Lines are completed here and written past
 * the caches; of the first and the last, other threads write the other part. */
enum { STREAM_BYTES = 2048, STEP_BYTES = 64 * COLUMNS };

typedef struct {
    char *line; /* where bytes[0] belongs */
    int64_t filled, skip; /* bytes; those in front that are another panel's */
    _Alignas(64) char bytes[STREAM_BYTES + STEP_BYTES + 64];
} stream;

INLINE void open_stream(stream *out, char *to)
{
    out->filled = out->skip = (int64_t)((uintptr_t)to % 64);
    out->line = to - out->filled;
    _mm512_store_si512(out->bytes, _mm512_setzero_si512());
}

INLINE void flush_stream(stream *out)
{
    int64_t at = 0;
    if (out->skip && out->filled >= 64) {
        _mm512_mask_storeu_epi8(out->line, ~srt_low_bits(out->skip), _mm512_load_si512(out->bytes));
        out->skip = 0, at = 64;
    }
    for (; at + 64 <= out->filled; at += 64)
        put_line(out->line + at, _mm512_load_si512(out->bytes + at));
    _mm512_store_si512(out->bytes, _mm512_load_si512(out->bytes + at));
    out->line += at, out->filled -= at;
}

INLINE void close_stream(stream *out)
{
    flush_stream(out);
    _mm512_mask_storeu_epi8(out->line, srt_low_bits(out->filled) & ~srt_low_bits(out->skip),
                            _mm512_load_si512(out->bytes));
    _mm_sfence();
}

/* The next 16 x 16 dwords of 16 rows, expanded: 32 columns of 2 bytes or 16 of 4, which the low bits of masks say. */
INLINE void expand_rows(char **from, const uint32_t *masks, int shift, __m512i v[16], int whole, int size)
{
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        uint64_t mask = size == 2 ? masks[r] : masks[r] >> shift & 0xffff;
        int64_t kept = popcount(mask);
        _mm_prefetch(from[r] + AHEAD, _MM_HINT_T1);
        v[r] = expand_block(mask, whole ? _mm512_loadu_si512(from[r]) : load_first(from[r], kept, size), size);
        from[r] += kept * size;
    }
}

/* 32 columns of a panel; words: their bitmask for each row. masks: of the vectors, as the layout has them. */
INLINE void pack_words(char **from, const uint32_t *words, char *masks, int whole, stream *out)
{
    __m512i v[16];
    pair_words pairs = double_halves(_mm512_load_si512(words));
    char *to = out->bytes + out->filled;
    expand_rows(from, words, 0, v, whole, 2);
    transpose(v);
#pragma GCC unroll 16
    for (int p = 0; p < 16; p++) {
        __mmask32 mask = pair_column(&pairs, p);
        uint32_t word = _cvtmask32_u32(mask);
        memcpy(masks + 4 * p, &word, 4);
        _mm512_storeu_si512(to, compress_words(mask, v[p]));
        to += 2 * popcount(word);
    }
    out->filled = to - out->bytes;
}

INLINE void pack_doubles(char **from, const uint32_t *words, char *masks, int whole, stream *out)
{
    __m512i rows = _mm512_load_si512(words);
    char *to = out->bytes + out->filled;
    for (int half = 0; half < 2; half++) {
        __m512i v[16];
        expand_rows(from, words, 16 * half, v, whole, 4);
        transpose(v);
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) {
            uint16_t mask = _mm512_test_epi32_mask(rows, _mm512_set1_epi32((int)(1u << (c + 16 * half))));
            memcpy(masks + 32 * half + 2 * c, &mask, 2);
            _mm512_storeu_si512(to, compress_doubles(mask, v[c]));
            to += 4 * popcount(mask);
        }
    }
    out->filled = to - out->bytes;
}

INLINE void pack_panel(const srt_source *s, srt_packed *w, int64_t panel, int whole, int size)
{
    char *from[17], *table = (char *)srt_masks(w) + panel * w->stride * srt_mask_size(size);
    int64_t table_bytes = w->stride * srt_mask_size(size);
    stream out;
    find_rows(s, panel, from);
    open_stream(&out, (char *)srt_data(w) + s->starts[panel] * size);
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        _Alignas(64) uint32_t words[16][16];
        __m512i lines[16];
        load_lines(s, panel, at, lines);
        transpose(lines);
        for (int k = 0; k < 16; k++)
            _mm512_store_si512(words[k], lines[k]);
        for (int64_t k = 0; k < 16 && at + COLUMNS * k < s->n; k++, table += 64, table_bytes -= 64) {
            char last[64], *masks = table_bytes < 64 ? last : table;
            if (size == 2)
                pack_words(from, words[k], masks, whole, &out);
            else
                pack_doubles(from, words[k], masks, whole, &out);
            if (out.filled >= STREAM_BYTES)
                flush_stream(&out);
            if (table_bytes < 64)
                memcpy(table, last, (size_t)table_bytes);
        }
    }
    close_stream(&out);
}

/* Whole vectors of values are loaded unless the panel ends too close to the end of all of them. */
TARGET static void pack_bitmask(const srt_source *s, srt_packed *w, int64_t panel)
{
    int whole = (s->nnz - s->starts[panel + 1]) * s->size >= 64;
    if (s->size == 2)
        whole ? pack_panel(s, w, panel, 1, 2) : pack_panel(s, w, panel, 0, 2);
    else
        whole ? pack_panel(s, w, panel, 1, 4) : pack_panel(s, w, panel, 0, 4);
}

/* ---- unpack --------------------------------------------------------------------------------------------------- */

/* 64 bytes of the table at byte `at`, zeros behind its end. */
INLINE __m512i load_masks(const srt_packed *w, int64_t panel, int64_t at, int size)
{
    int64_t bytes = w->stride * srt_mask_size(size);
    return _mm512_maskz_loadu_epi8(srt_low_bits(srt_min(64, bytes - at)), srt_masks(w) + panel * bytes + at);
}

INLINE void unpack_masks(const srt_source *s, const srt_packed *w, int64_t panel, int size)
{
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        _Alignas(64) uint32_t words[16][16] = {{0}};
        __m512i lines[16];
        for (int64_t k = 0; k < 16 && at + COLUMNS * k < s->n; k++) {
            __m512i masks = load_masks(w, panel, (at + COLUMNS * k) * 2, size);
            pair_words pairs = double_halves(masks);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                words[r][k] = size == 2 ? pair_column(&pairs, r)
                                        : _mm512_test_epi16_mask(masks, _mm512_set1_epi16((short)(1 << r)));
        }
        for (int r = 0; r < 16; r++)
            lines[r] = _mm512_load_si512(words[r]);
        store_lines(s, panel, at, lines);
    }
}

/* 16 vectors of the layout -> the kept elements of 16 rows; `whole`: no row ends within 64 bytes. */
INLINE const char *unpack_vectors(const char *from, const char *masks, char **to, const uint32_t *words, int shift,
                                  int whole, int size)
{
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        uint32_t wide;
        uint16_t narrow;
        memcpy(&wide, masks + (size == 2 ? 4 * i : 0), 4);
        memcpy(&narrow, masks + 2 * i, 2);
        uint64_t mask = size == 2 ? wide : narrow;
        v[i] = expand_block(mask, _mm512_loadu_si512(from), size);
        from += popcount(mask) * size;
        _mm_prefetch(from + 2 * AHEAD, _MM_HINT_T0);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        uint64_t mask = size == 2 ? words[r] : words[r] >> shift & 0xffff;
        __m512i kept = compress_block(mask, v[r], size);
        if (whole)
            _mm512_storeu_si512(to[r], kept);
        else
            store_first(to[r], popcount(mask), kept, size);
        to[r] += popcount(mask) * size;
    }
    return from;
}

INLINE const char *unpack_step(const char *from, const srt_packed *w, int64_t panel, int64_t column, char **to,
                               const uint32_t *words, int whole, int size)
{
    _Alignas(64) char masks[64];
    _mm512_store_si512(masks, load_masks(w, panel, 2 * column, size));
    from = unpack_vectors(from, masks, to, words, 0, whole, size);
    return size == 2 ? from : unpack_vectors(from, masks + 32, to, words, 16, whole, size);
}

INLINE void unpack_panel(const srt_source *s, const srt_packed *w, int64_t panel, int size)
{
    const char *from = srt_data(w) + srt_offsets(w)[panel] * size;
    char *to[17];
    unpack_masks(s, w, panel, size);
    find_rows(s, panel, to);
    __m512i left = _mm512_setzero_si512(); /* elements of every row */
    for (int r = 0; r < 16; r++)
        left = _mm512_mask_set1_epi32(left, (__mmask16)(1 << r), (int)((to[r + 1] - to[r]) / size));
    for (int64_t at = 0; at < s->n; at += SRT_LINE_COLUMNS) {
        _Alignas(64) uint32_t words[16][16];
        __m512i lines[16];
        load_lines(s, panel, at, lines);
        transpose(lines);
        for (int k = 0; k < 16; k++) {
            _mm512_store_si512(words[k], lines[k]);
            left = _mm512_sub_epi32(left, _mm512_popcnt_epi32(lines[k]));
        }
        int whole = _mm512_cmplt_epi32_mask(left, _mm512_set1_epi32(64 / size)) == 0;
        for (int64_t k = 0; k < 16 && at + COLUMNS * k < s->n; k++)
            from = whole ? unpack_step(from, w, panel, at + COLUMNS * k, to, words[k], 1, size)
                         : unpack_step(from, w, panel, at + COLUMNS * k, to, words[k], 0, size);
    }
}

TARGET static void unpack_bitmask(const srt_source *s, const srt_packed *w, int64_t panel)
{
    if (s->size == 2)
        unpack_panel(s, w, panel, 2);
    else
        unpack_panel(s, w, panel, 4);
}

/* ---- table ---------------------------------------------------------------------------------------------------- */

const srt_maker srt_maker_avx512 = {
    .count = count,
    .count_steps = srt_avx512_count_steps,
    .pack = {[SRT_BITMASK] = pack_bitmask, [SRT_PAIRS] = srt_avx512_pack_pairs, [SRT_SLOTS] = srt_avx512_pack_slots},
    .unpack_slot_masks = srt_avx512_unpack_slot_masks,
    .unpack = {[SRT_BITMASK] = unpack_bitmask, [SRT_PAIRS] = srt_avx512_unpack_pairs,
               [SRT_SLOTS] = srt_avx512_unpack_slots},
};
#endif
