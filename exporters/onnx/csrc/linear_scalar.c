#define TARGET
#define LINEAR srt_linear_scalar
#define ROWS srt_rows_scalar
#include "linear_portable.h"
