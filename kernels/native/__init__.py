"""Native CPU kernels: C, compiled at first use with the machine's compiler, called through ctypes.

build.py      compile csrc/ into the user's cache (never at import)
library.py    load it once, or remember why it cannot be used; the signatures of the C functions
ops.py        operations on the canonical tensors (training), registered as backend ``native``
gradient.py   the gradient of kept values, and the factors of a weight (SPP)
packed.py     derived layouts: which one a weight gets, pack and unpack (serving)
torch_op.py   the product with them, registered in torch's dispatcher from C
pages.py      2 MB pages for them; pages of a mapped checkpoint that they replace
checks.py     what the C side takes on trust

csrc/, by what a file does (each instruction set has its own file, chosen at run time):
  entries.c, avx512.c, avx2.c, scalar.c      decompress and gather, a row at a time
  grad*.c, factors*.c                        gradient tiles, factors of rows and columns
  packed.h                                   the layouts of a packed weight; read this first
  packed_make.c, make_*.c                    canonical tensors -> packed weight, and back
  packed.c, packed_x*.c, tiles_*.c           the product: blocks of tokens, layouts of x, tile kernels
  torch_op.c                                 the product as a kernel of torch's dispatcher
  pages.c                                    what the system is told about memory
  parallel.c                                 threads
"""
