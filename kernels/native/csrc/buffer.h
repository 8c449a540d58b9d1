/* Work space of the calling thread; see buffer.c. */
#ifndef SPARSE_RT_BUFFER_H
#define SPARSE_RT_BUFFER_H

#include <stdint.h>

/* At least so many bytes, aligned to 64, until the thread's next call; NULL where there is no memory. */
char *srt_thread_buffer(int64_t bytes);

#endif
