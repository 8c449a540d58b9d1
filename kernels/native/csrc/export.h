/* Marks the functions that Python calls; everything else stays inside the library. */
#ifndef SPARSE_RT_EXPORT_H
#define SPARSE_RT_EXPORT_H

#define EXPORT __attribute__((visibility("default")))

#endif
