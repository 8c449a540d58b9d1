"""Native CPU kernels: C, compiled at first use with the machine's compiler, called through ctypes.

build.py     compile csrc/ into the user's cache (never at import)
library.py   load it once, or remember why it cannot be used
ops.py       the torch-facing functions and their registration as backend ``native``
csrc/        entries.c (C ABI, threads); avx512.c, avx2.c and scalar.c (row kernels)
"""
