/* Where the values of every row of a weight start. */
#ifndef SPARSE_RT_STARTS_H
#define SPARSE_RT_STARTS_H

#include <stdint.h>

/* starts [m + 1] = the first value of every row, the total last and returned; nibbles: 2:4 rather than a bitmask. */
int64_t srt_find_starts(int64_t *starts, const uint8_t *meta, int nibbles, int64_t m, int64_t n, int threads);

#endif
