/* What the system is told about memory; see pages.c. */
#ifndef SPARSE_RT_PAGES_H
#define SPARSE_RT_PAGES_H

#include <stdint.h>

#include "export.h"

EXPORT void srt_advise_huge(void *start, int64_t bytes);
EXPORT void srt_page_out(void *start, int64_t bytes);

#endif
