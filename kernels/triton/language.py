"""What every kernel is built from: the dot product, popcount, and the loaders of a tile of compressed weights.

A tile is ``BN`` rows by one block of 128 columns. The launchers pass what ``tiles.tile_arguments`` makes of a weight:

    meta_ptr      int32 words of the metadata, ``meta_stride`` words a row; padding bits are 0
    starts_ptr    int64 [m + 1]: where the values of a row start; unused (any int64 pointer) with NIBBLES
    offsets_ptr   int32 [m, blocks]: kept weights of a row before column 128 k; unused (any int32 pointer) with NIBBLES

``rows`` is an integer tensor [BN], ``row_mask`` bool [BN] (False: the row lies outside the weight and reads as empty),
``block`` the index of the block of columns. NIBBLES is True for 2:4 (``weight_meta``), False for a bitmask.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels run in the interpreter. Triton decides when a kernel is decorated, which is when a module is imported.
INTERPRET: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


class _Number(int):
    """A constant for the interpreter: there ``constexpr + tensor`` would be a constexpr and good for nothing."""

    @property
    def value(self) -> int:
        return int(self)


_constant = _Number if INTERPRET.value else tl.constexpr
BLOCK: tl.constexpr = _constant(128)  # columns of a tile; outside of kernels: BLOCK.value
WORDS: tl.constexpr = _constant(4)  # words of metadata in a row of a tile: 32 bits, or 8 nibbles of 4 columns, each


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums: a [M, K], b [K, N] of one dtype, acc float32 [M, N].

    The interpreter keeps bfloat16 as uint16 and its dot multiplies the raw bits, without a word: it is widened there.
    float32 operands are multiplied as float32, not rounded to TF32 first.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x`` rounded to nearest, ties to even. To bfloat16 the interpreter cuts float32 off; it is rounded before."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def popcount(x):
    """Set bits of every uint32 or int32, as int32; the compiler makes one ``popc`` of it."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(meta_ptr, rows, row_mask, block, meta_stride):
    """Metadata of a tile: uint32 [BN, 4]; 0 outside of the weight."""
    index = block * WORDS + tl.arange(0, WORDS)
    inside = row_mask[:, None] & (index < meta_stride)[None, :]
    words = tl.load(meta_ptr + rows.to(tl.int64)[:, None] * meta_stride + index[None, :], mask=inside, other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def load_mask(meta_ptr, rows, row_mask, block, n, meta_stride, BN: tl.constexpr, NIBBLES: tl.constexpr):
    """Kept positions of a tile: bool [BN, 128]; False outside of the weight."""
    words = load_words(meta_ptr, rows, row_mask, block, meta_stride)
    if NIBBLES:
        _, kept = _pair_ranks(words, block, n, BN)
        return kept & row_mask[:, None]
    else:
        bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
        return tl.reshape(bits, (BN, BLOCK)) != 0


@triton.jit
def load_positions(
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    rows,
    row_mask,
    block,
    n,
    meta_stride,
    BN: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    """(positions, kept): int64 [BN, 128] index of every weight of a tile in the values, bool [BN, 128] where it is one.

    Where ``kept`` is False the index may point anywhere: load and store with ``mask=kept``.
    """
    words = load_words(meta_ptr, rows, row_mask, block, meta_stride)
    if NIBBLES:
        ranks, kept = _pair_ranks(words, block, n, BN)
        starts = rows.to(tl.int64) * (n // 2) + block * (BLOCK // 2)
        groups = tl.arange(0, BLOCK) // 4 * 2
        return starts[:, None] + (groups[None, :] + ranks), kept & row_mask[:, None]
    else:
        starts = _row_starts(starts_ptr, offsets_ptr, rows, row_mask, block, n)
        ranks, kept = _bit_ranks(words)
        positions = starts[:, None] + tl.reshape(ranks, (BN, BLOCK))
        return positions, tl.reshape(kept.to(tl.int32), (BN, BLOCK)) != 0


@triton.jit
def load_tile(
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    rows,
    row_mask,
    block,
    m,
    n,
    meta_stride,
    BN: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    """The weights of a tile in the dtype of the values: [BN, 128]; 0 where nothing is kept, and outside."""
    words = load_words(meta_ptr, rows, row_mask, block, meta_stride)
    if NIBBLES:
        return _load_pairs(values_ptr, words, rows, row_mask, block, n, BN)
    else:
        starts = _row_starts(starts_ptr, offsets_ptr, rows, row_mask, block, n)
        ranks, kept = _bit_ranks(words)
        # The row's part of the address is 64 bits wide, the part within a tile 32: one instruction less a weight.
        weights = tl.load((values_ptr + starts)[:, None, None] + ranks, mask=kept, other=0.0)
        return tl.reshape(weights, (BN, BLOCK))


@triton.jit
def _row_starts(starts_ptr, offsets_ptr, rows, row_mask, block, n):
    """int64 [BN]: where the values of a tile's rows start."""
    blocks = (n + BLOCK - 1) // BLOCK
    starts = tl.load(starts_ptr + rows, mask=row_mask, other=0)
    return starts + tl.load(offsets_ptr + rows.to(tl.int64) * blocks + block, mask=row_mask, other=0)


@triton.jit
def _bit_ranks(words):
    """uint32 [BN, 4] -> kept weights before each position, int32 [BN, 4, 32], and whether it is kept."""
    bit = tl.arange(0, 32).to(tl.uint32)
    below = (tl.full((32,), 1, tl.uint32) << bit) - 1
    counts = popcount(words)
    before = tl.cumsum(counts, axis=1) - counts
    ranks = before[:, :, None] + popcount(words[:, :, None] & below[None, None, :])
    return ranks, ((words[:, :, None] >> bit[None, None, :]) & 1) != 0


@triton.jit
def _pair_ranks(words, block, n, BN: tl.constexpr):
    """2:4, uint32 [BN, 4] -> 0 or 1 (which of its group's two values a position holds) and whether it is kept."""
    lane = tl.arange(0, 32)
    nibbles = words[:, :, None] >> (lane // 4 * 4).to(tl.uint32)[None, None, :]
    column = (lane % 4).to(tl.uint32)[None, None, :]
    first = tl.reshape(((nibbles & 3) == column).to(tl.int32), (BN, BLOCK))
    second = tl.reshape((((nibbles >> 2) & 3) == column).to(tl.int32), (BN, BLOCK))
    inside = (block * BLOCK + tl.arange(0, BLOCK)) < n
    return second, ((first + second) != 0) & inside[None, :]


@triton.jit
def _load_pairs(values_ptr, words, rows, row_mask, block, n, BN: tl.constexpr):
    """2:4: the values are read in one piece and each is put on one of four columns by comparisons.

    Reading every position through its rank costs twice the instructions and all registers.
    """
    index = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = row_mask[:, None] & (index < n // 2)[None, :]
    pairs = tl.load(values_ptr + (rows.to(tl.int64) * (n // 2))[:, None] + index[None, :], mask=inside, other=0.0)
    left, right = tl.split(tl.reshape(pairs, (BN, BLOCK // 4, 2)))
    shift = (tl.arange(0, 8) * 4).to(tl.uint32)
    nibbles = tl.reshape(words[:, :, None] >> shift[None, None, :], (BN, BLOCK // 4))
    first, second = nibbles & 3, (nibbles >> 2) & 3
    zero = tl.zeros_like(left)
    column0 = tl.where(first == 0, left, zero)
    column1 = tl.where(first == 1, left, tl.where(second == 1, right, zero))
    column2 = tl.where(first == 2, left, tl.where(second == 2, right, zero))
    column3 = tl.where(second == 3, right, zero)
    return tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), (BN, BLOCK))
