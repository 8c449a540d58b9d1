#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define LINEAR srt_linear_avx2
#define ROWS srt_rows_avx2
#include "linear_portable.h"
#endif
