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
        inside = (block * BLOCK + tl.arange(0, BLOCK)) < n
        return _pair_mask(words, BN) & inside[None, :] & row_mask[:, None]
    else:
        bits = _nibbles(words, BN)
        return _interleave(bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1, BN) != 0


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
        bits, rank = _bit_ranks(words, BN)
        bit0, bit1, bit2, bit3 = bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1
        # Four weights a thread: what is known of their nibble is computed once for them.
        first = (values_ptr + starts)[:, None] + rank
        third = first + bit0 + bit1
        column0 = tl.load(first, mask=bit0 != 0, other=0.0)
        column1 = tl.load(first + bit0, mask=bit1 != 0, other=0.0)
        column2 = tl.load(third, mask=bit2 != 0, other=0.0)
        column3 = tl.load(third + bit2, mask=bit3 != 0, other=0.0)
        return _barrier(_interleave(column0, column1, column2, column3, BN))


@triton.jit
def store_tile(
    tile,
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
    """The inverse of ``load_tile``: write a tile [BN, 128] of the dtype of the values where weights are kept."""
    words = load_words(meta_ptr, rows, row_mask, block, meta_stride)
    even, odd = tl.split(tl.reshape(tile, (BN, BLOCK // 4, 2, 2)))
    column0, column2 = tl.split(even)
    column1, column3 = tl.split(odd)
    if NIBBLES:
        nibbles = _nibbles(words, BN)
        first, second = nibbles & 3, (nibbles >> 2) & 3
        left = tl.where(first == 0, column0, tl.where(first == 1, column1, column2))
        right = tl.where(second == 1, column1, tl.where(second == 2, column2, column3))
        index = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        pairs = values_ptr + (rows.to(tl.int64) * (n // 2))[:, None] + index[None, :]
        inside = row_mask[:, None] & (index < n // 2)[None, :]
        tl.store(pairs, tl.reshape(tl.join(left, right), (BN, BLOCK // 2)), mask=inside)
    else:
        starts = _row_starts(starts_ptr, offsets_ptr, rows, row_mask, block, n)
        bits, rank = _bit_ranks(words, BN)
        bit0, bit1, bit2, bit3 = bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1
        first = (values_ptr + starts)[:, None] + rank
        third = first + bit0 + bit1
        tl.store(first, column0, mask=bit0 != 0)
        tl.store(first + bit0, column1, mask=bit1 != 0)
        tl.store(third, column2, mask=bit2 != 0)
        tl.store(third + bit2, column3, mask=bit3 != 0)


@triton.jit
def _row_starts(starts_ptr, offsets_ptr, rows, row_mask, block, n):
    """int64 [BN]: where the values of a tile's rows start."""
    blocks = (n + BLOCK - 1) // BLOCK
    starts = tl.load(starts_ptr + rows, mask=row_mask, other=0)
    return starts + tl.load(offsets_ptr + rows.to(tl.int64) * blocks + block, mask=row_mask, other=0)


@triton.jit
def _interleave(column0, column1, column2, column3, BN: tl.constexpr):
    """[BN, 32] each: columns 4 g, 4 g + 1, ... of the tile -> [BN, 128]."""
    return tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), (BN, BLOCK))


@triton.jit
def _barrier(tile):
    """``tile``, and nothing in machine code. Triton 3.6 moves a reshape right in front of ``dot`` into the layout of
    shared memory and then calls that layout illegal (sm_90, sm_100); it does not move it past two casts of the bits."""
    if tile.dtype == tl.float64:
        return tile
    elif tile.dtype == tl.float32:
        return tile.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.int16, bitcast=True).to(tile.dtype, bitcast=True)


@triton.jit
def _nibbles(words, BN: tl.constexpr):
    """uint32 [BN, 4] -> the four bits of every group of four columns: int32 [BN, 32], higher bits undefined."""
    shift = (tl.arange(0, 8) * 4).to(tl.uint32)
    return tl.reshape((words[:, :, None] >> shift[None, None, :]).to(tl.int32, bitcast=True), (BN, BLOCK // 4))


@triton.jit
def _bit_ranks(words, BN: tl.constexpr):
    """uint32 [BN, 4] -> ``_nibbles`` and the number of kept weights of the tile's row before each: int32 [BN, 32]."""
    shift = (tl.arange(0, 8) * 4).to(tl.uint32)
    below = (tl.full((8,), 1, tl.uint32) << shift) - 1
    counts = popcount(words)
    before = tl.cumsum(counts, axis=1) - counts
    ranks = before[:, :, None] + popcount(words[:, :, None] & below[None, None, :])
    return _nibbles(words, BN), tl.reshape(ranks, (BN, BLOCK // 4))


@triton.jit
def _pair_mask(words, BN: tl.constexpr):
    """2:4, uint32 [BN, 4] -> whether a position is kept: bool [BN, 128]."""
    nibbles = _nibbles(words, BN)
    first, second = nibbles & 3, (nibbles >> 2) & 3
    kept = _interleave(
        ((first == 0) | (second == 0)).to(tl.int32),
        ((first == 1) | (second == 1)).to(tl.int32),
        ((first == 2) | (second == 2)).to(tl.int32),
        ((first == 3) | (second == 3)).to(tl.int32),
        BN,
    )
    return kept != 0


@triton.jit
def _load_pairs(values_ptr, words, rows, row_mask, block, n, BN: tl.constexpr):
    """2:4: the values are read in one piece and each is put on one of four columns by comparisons.

    Reading every position through its rank costs twice the instructions and all registers.
    """
    index = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = row_mask[:, None] & (index < n // 2)[None, :]
    pairs = tl.load(values_ptr + (rows.to(tl.int64) * (n // 2))[:, None] + index[None, :], mask=inside, other=0.0)
    left, right = tl.split(tl.reshape(pairs, (BN, BLOCK // 4, 2)))
    nibbles = _nibbles(words, BN)
    first, second = nibbles & 3, (nibbles >> 2) & 3
    zero = tl.zeros_like(left)
    column0 = tl.where(first == 0, left, zero)
    column1 = tl.where(first == 1, left, tl.where(second == 1, right, zero))
    column2 = tl.where(first == 2, left, tl.where(second == 2, right, zero))
    column3 = tl.where(second == 3, right, zero)
    return _barrier(_interleave(column0, column1, column2, column3, BN))
