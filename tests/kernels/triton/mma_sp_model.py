"""What mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{bf16,f16}.{bf16,f16}.f32 computes, in NumPy.

Written from the PTX ISA (8.x, 9.x), not from the packer:
- 9.7.14.6.1 "Sparse matrix storage": two of four adjacent elements of a row of A are stored; their indices are four
  bits, the lower index in the lower two bits; meaningful are 0100, 1000, 1001, 1100, 1101, 1110. For m16n8k32 the
  sparsity selector is 0 (threads T0, T1 of a group of four hold the metadata) or 1 (T2, T3).
- 9.7.14.6.2.2 "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types": formulas for A; figure 121 for B;
  figure 122 for the metadata: of the two threads the first holds columns 0-15, the second columns 16-31; bits 0-15 are
  row groupID, bits 16-31 row groupID + 8; four bits a chunk of four columns, ascending.
- 9.7.14.5.8 "Matrix Fragments for mma.m16n8k16 with floating point type": C and D.
LLVM's integration test sparse-mma-2-4-f16.mlir, which runs on sm_80, distributes its operands in the same way, and
CUTLASS's reorder_meta (in torch: _semi_structured_conversions) orders the metadata words like this.
"""

from __future__ import annotations

import numpy as np

MEANINGFUL = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)
LANES = np.arange(32)
GROUP, THREAD = LANES >> 2, LANES % 4


class UndefinedBehaviour(Exception):
    """The PTX ISA does not say what the instruction would do."""


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, e: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """D = A B + C of a warp (or of warps, in leading dimensions), in float64.

    a, b: uint32 [..., 32 lanes, 4 registers]; c: float [..., 32, 4]; e: uint32 [..., 32]; kind: "bf16" or "f16".
    Returns float64 [..., 32, 4].
    """
    rows, columns, stored = matrix_a(a, e, selector, kind)
    dense_b = matrix_b(b, kind)
    d = np.zeros((*c.shape[:-2], 16, 8))
    for i in range(8):
        # Only the elements of B that the metadata select are multiplied: a pruned position never meets an infinity.
        chosen = np.take_along_axis(dense_b, columns[..., i, None], axis=-2)
        np.add.at(np.moveaxis(d, -2, 0), rows[i], np.moveaxis(stored[..., i, None] * chosen, -2, 0))
    return dense_to_lanes(d) + c.astype(np.float64)


def matrix_a(a: np.ndarray, e: np.ndarray, selector: int, kind: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The stored elements a0 .. a7 of every lane: rows (8 of [32]), columns and values [..., 32, 8]."""
    if selector not in (0, 1):
        raise UndefinedBehaviour(f"sparsity selector {selector}")
    rows, columns = [], []
    for i in range(8):
        row = GROUP if i < 2 or 4 <= i < 6 else GROUP + 8
        first_column = THREAD * 4 if i < 4 else THREAD * 4 + 16
        index = indices(e, selector, row, first_column // 4)
        rows.append(row)
        columns.append(first_column + (index & 3 if i % 2 == 0 else index >> 2))
    return rows, np.stack(columns, axis=-1), halves(a, kind)


def indices(e: np.ndarray, selector: int, row: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """The four metadata bits of chunks (of four columns) of rows."""
    holder = row % 8 * 4 + 2 * selector + chunk // 4
    bits = (e[..., holder] >> (row // 8 * 16 + chunk % 4 * 4).astype(np.uint32)) & 15
    if not np.isin(bits, MEANINGFUL).all():
        raise UndefinedBehaviour(f"metadata {sorted(set(bits.ravel().tolist()) - set(MEANINGFUL))}")
    return bits.astype(np.int64)


def matrix_b(b: np.ndarray, kind: str) -> np.ndarray:
    """The 32 x 8 matrix that the lanes' registers stand for."""
    elements = halves(b, kind)
    out = np.zeros((*b.shape[:-2], 32, 8))
    for i in range(8):
        out[..., THREAD * 2 + i % 2 + i // 2 * 8, GROUP] = elements[..., i]
    return out


def dense_to_lanes(d: np.ndarray) -> np.ndarray:
    """A 16 x 8 matrix -> the accumulators [..., 32, 4]."""
    columns = [(GROUP + i // 2 * 8, THREAD * 2 + i % 2) for i in range(4)]
    return np.stack([d[..., row, column] for row, column in columns], axis=-1)


def lanes_to_dense(c: np.ndarray) -> np.ndarray:
    """The accumulators [..., 32, 4] -> the 16 x 8 matrix."""
    out = np.zeros((*c.shape[:-2], 16, 8), c.dtype)
    for i in range(4):
        out[..., GROUP + i // 2 * 8, THREAD * 2 + i % 2] = c[..., i]
    return out


def halves(registers: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [..., k] -> float64 [..., 2 k]: the lower half of a register comes first."""
    bits = np.stack((registers & 0xFFFF, registers >> 16), axis=-1).reshape(*registers.shape[:-1], -1).astype(np.uint16)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
