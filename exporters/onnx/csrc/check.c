/* What a file may claim and a kernel must not believe. */
#include <stdio.h>

#include "linear.h"

static int64_t kept_of(const srt_weight *w, int64_t row)
{
    return srt_chosen_linear()->rows->count(w->meta + row * srt_meta_bytes(w), w->n);
}

static int check_offsets(const srt_weight *w, int64_t values, char *message)
{
    if (w->offsets[0] != 0)
        return snprintf(message, SRT_MESSAGE, "row_offsets must begin with 0, not %d", w->offsets[0]), -1;
    for (int64_t row = 0; row < w->m; row++) {
        int64_t from = w->offsets[row], to = w->offsets[row + 1], kept = kept_of(w, row);
        if (to - from != kept)
            return snprintf(message, SRT_MESSAGE,
                            "row %lld: mask keeps %lld columns, row_offsets give it %lld values (%lld to %lld)",
                            (long long)row, (long long)kept, (long long)(to - from), (long long)from, (long long)to),
                   -1;
        if (to > values)
            return snprintf(message, SRT_MESSAGE, "row %lld: row_offsets end at value %lld, values has %lld",
                            (long long)row, (long long)to, (long long)values),
                   -1;
    }
    return 0;
}

/* Both nibbles of a byte name two columns in ascending order. */
static int good_pairs(uint8_t byte)
{
    return (byte & 3) < (byte >> 2 & 3) && (byte >> 4 & 3) < (byte >> 6);
}

static int check_pairs(const srt_weight *w, int64_t values, char *message)
{
    if (values != w->m * (w->n / 2))
        return snprintf(message, SRT_MESSAGE, "values holds %lld, a 2:4 weight [%lld, %lld] has %lld",
                        (long long)values, (long long)w->m, (long long)w->n, (long long)(w->m * (w->n / 2))),
               -1;
    for (int64_t row = 0; row < w->m; row++)
        for (int64_t i = 0; i < srt_meta_bytes(w); i++) {
            uint8_t byte = w->meta[row * srt_meta_bytes(w) + i];
            if (8 * i + 4 >= w->n) /* the last group alone in its byte */
                byte = (uint8_t)((byte & 15) | 0x40);
            if (!good_pairs(byte))
                return snprintf(message, SRT_MESSAGE, "row %lld, columns from %lld: meta 0x%02x names no two columns",
                                (long long)row, (long long)(8 * i), byte),
                       -1;
        }
    return 0;
}

int srt_check_weight(const srt_weight *w, int64_t values, char *message)
{
    switch (w->kind) {
    case SRT_KEEP_BITMASK: return check_offsets(w, values, message);
    case SRT_KEEP_PAIRS: return check_pairs(w, values, message);
    default: return 0; /* its shape says everything */
    }
}
