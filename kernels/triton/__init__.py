"""GPU kernels in Triton. Nothing here imports Triton before a kernel runs, except the modules that hold kernels.

ops.py          the operations on canonical tensors, registered as backend ``triton``
dispatch.py     for which products a kernel is used: those measured on this GPU; all others form the dense weight once
language.py     what kernels are built from: dot, popcount, loaders of a tile of compressed weights
tiles.py        what those loaders read: metadata in words, where the values of a row and block of columns start
configs.py      launch configurations: configs/*.json, one file a GPU
linear.py       y = x W^T and dx = dy W, decoding tiles of W
decompress.py   the dense weight, and the kept positions of a dense matrix
gradient.py     dy^T x where weights are kept, and what can be reduced from it without writing it
layouts.py      which layout a served weight gets, made at load; packed.py: pack, unpack, product
  d4.py         unstructured and N:M: groups of 16 kept weights with 4-bit gaps
  mma_sp.py     2:4 in the order of the sparse tensor cores' registers
  cslt.py       2:4 and many tokens through cuSPARSELt

Every module with kernels has ``compile_specs()``: what tests/kernels/triton compiles for every architecture. Kernels
use float32 sums, 64-bit offsets and explicit masks; launchers take any shape and never wait for the device.
"""
