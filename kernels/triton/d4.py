"""Products with a weight in the layout d4 (``d4_layout``): up to 8 tokens at a time per kept weight, and its expansion.

A thread owns one group of 16 slots at a time. The distances of 8 slots become 8 columns by one multiplication: with
the pair sums of the nibbles in four bytes, times 0x01010101 is a running sum of bytes.

x of several tokens is read as [n][T], so that one gather brings all tokens of a column. Where x holds an infinity or
NaN, a result may be NaN through a slot that stores no weight, as in a dense product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.d4_layout import BITS, PIECE_BYTES, ROWS, SLOTS, TOKENS, Sections, anchor_dtype
from sparse_rt.kernels.triton.language import cast
from sparse_rt.kernels.triton.tiles import on_device

# Warps on a multiprocessor, up to 4 tokens and beyond: where there are few programs, each has more warps. Measured on
# an H100, four shapes and three sparsities (benchmarks/gpu_tune.py).
WARPS, WARPS_OF_MANY_TOKENS = 32, 16
MOST_WARPS = 16
# EACH: slots that a lane writes in a round. By columns, at most: the rows of all programs that run at a time, which
# they set to zero first, should fit into the second-level cache.
EXPAND = {8192: dict(EACH=8, num_warps=16, num_stages=1), None: dict(EACH=16, num_warps=16, num_stages=1)}
FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _running_sums(word):
    """8 nibbles -> their running sums (up to 120), in bytes: to the nibbles 0 2 4 6, and to 1 3 5 7."""
    even = word & 0x0F0F0F0F
    odd = (word >> 4) & 0x0F0F0F0F
    to_odd = (even + odd) * 0x01010101
    return to_odd - odd, to_odd


@triton.jit
def _unpack_pair(words, dtype: tl.constexpr):
    """Two values of 2 bytes in a word, as float32. bfloat16 is the upper half of it: one instruction each."""
    if dtype == tl.bfloat16:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        return low.to(dtype, bitcast=True).to(tl.float32), high.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _load_groups(words_ptr, stride, gaps_ptr, anchors_ptr, q, count, dtype: tl.constexpr, ONCE: tl.constexpr):
    """(gaps, anchors, values) of groups q: [GROUPS], and a tuple of words [GROUPS, 4], 16 bytes of values each.

    ``stride`` words lie between two pieces of 16 bytes of a group. Groups from ``count`` on are zeros.
    ``ONCE``: no other pass reads them, so they are the first to leave the caches, in which x stays.
    """
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    live = q < count
    gaps = tl.load(gaps_ptr + q, mask=live, other=0, eviction_policy=POLICY)
    anchors = tl.load(anchors_ptr + q, mask=live, other=0, eviction_policy=POLICY)
    at = words_ptr + q[:, None] * 4 + tl.arange(0, 4)[None, :]
    first = tl.load(at, mask=live[:, None], other=0, eviction_policy=POLICY)
    second = tl.load(at + stride, mask=live[:, None], other=0, eviction_policy=POLICY)
    if dtype == tl.float32:
        third = tl.load(at + 2 * stride, mask=live[:, None], other=0, eviction_policy=POLICY)
        fourth = tl.load(at + 3 * stride, mask=live[:, None], other=0, eviction_policy=POLICY)
        return gaps, anchors, first, second, third, fourth
    else:
        return gaps, anchors, first, second, first, second


@triton.jit
def _split(tile, GROUPS: tl.constexpr):
    even, odd = tl.split(tl.reshape(tile, (GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _values(words, more, GROUPS: tl.constexpr, dtype: tl.constexpr):
    """The 8 values of half a group as float32, each [GROUPS]; of 4 bytes the last four are in ``more``."""
    w0, w1, w2, w3 = _split(words, GROUPS)
    if dtype == tl.float32:
        w4, w5, w6, w7 = _split(more, GROUPS)
        v0, v1 = w0.to(tl.float32, bitcast=True), w1.to(tl.float32, bitcast=True)
        v2, v3 = w2.to(tl.float32, bitcast=True), w3.to(tl.float32, bitcast=True)
        v4, v5 = w4.to(tl.float32, bitcast=True), w5.to(tl.float32, bitcast=True)
        v6, v7 = w6.to(tl.float32, bitcast=True), w7.to(tl.float32, bitcast=True)
    else:
        v0, v1 = _unpack_pair(w0, dtype)
        v2, v3 = _unpack_pair(w1, dtype)
        v4, v5 = _unpack_pair(w2, dtype)
        v6, v7 = _unpack_pair(w3, dtype)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _columns(anchors):
    if anchors.dtype == tl.int16:
        return anchors.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return anchors


@triton.jit
def _add(low, high, x_ptrs, sums, pair: tl.constexpr, value, W: tl.constexpr, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """Sums [GROUPS, W] += value [GROUPS] times x at the column that byte ``pair`` of ``sums`` is ahead of x_ptrs.

    PAIRS: x is words of two tokens, which add to ``low`` and to ``high``; otherwise all add to ``low``.
    """
    ahead = ((sums >> (8 * pair)) & 255).to(tl.int32)
    x = tl.load(x_ptrs + (ahead * W)[:, None])
    if PAIRS:
        x0, x1 = _unpack_pair(x, dtype)
        return low + value[:, None] * x0, high + value[:, None] * x1
    else:
        return low + value[:, None] * x.to(tl.float32), high


@triton.jit
def _add_half(low, high, x_ptrs, word, v, W: tl.constexpr, dtype: tl.constexpr, PAIRS: tl.constexpr):
    even, odd = _running_sums(word)
    low, high = _add(low, high, x_ptrs, even, 0, v[0], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, odd, 0, v[1], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, even, 1, v[2], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, odd, 1, v[3], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, even, 2, v[4], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, odd, 2, v[5], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, even, 3, v[6], W, dtype, PAIRS)
    low, high = _add(low, high, x_ptrs, odd, 3, v[7], W, dtype, PAIRS)
    return low, high, (odd >> 24).to(tl.int32)


@triton.jit
def gemv_kernel(
    x_ptr,
    words_ptr,
    gaps_ptr,
    anchors_ptr,
    starts_ptr,
    rows_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    groups,
    tokens,
    passes,
    T: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    ONCE: tl.constexpr,
):
    """y [tokens, m] = x W^T + bias for the rows of one block and T tokens.

    x [passes, n, T]; where T > 1 and its elements take 2 bytes it comes as words, [passes, n, T / 2]. The passes over
    a block follow each other, so that all but the first find it in the cache.
    """
    block = tl.program_id(0) // passes
    first_token = tl.program_id(0) % passes * T
    PAIRS: tl.constexpr = T > 1 and dtype != tl.float32
    W: tl.constexpr = T // 2 if PAIRS else T
    x_ptr += (first_token // T).to(tl.int64) * n * W
    start = tl.multiple_of(tl.load(starts_ptr + block), ROWS)
    count = (tl.load(starts_ptr + block + 1) - start).to(tl.int32)
    stride = tl.multiple_of(groups.to(tl.int64) * 4, ROWS * 4)
    words_ptr += start * 4
    gaps_ptr += start
    anchors_ptr += start
    lane = tl.arange(0, GROUPS)
    low = tl.zeros((GROUPS, W), dtype=tl.float32)
    high = tl.zeros((GROUPS, W), dtype=tl.float32)
    gaps, anchors, a, b, c, d = _load_groups(words_ptr, stride, gaps_ptr, anchors_ptr, lane, count, dtype, ONCE)
    for done in range(GROUPS, count + GROUPS, GROUPS):
        x_ptrs = x_ptr + (_columns(anchors) * W)[:, None] + tl.arange(0, W)[None, :]
        if dtype == tl.float32:
            first, second = _values(a, b, GROUPS, dtype), _values(c, d, GROUPS, dtype)
        else:
            first, second = _values(a, a, GROUPS, dtype), _values(b, b, GROUPS, dtype)
        near, far = gaps.to(tl.uint32), (gaps >> 32).to(tl.uint32)
        # The next groups are asked for before x of these: a warp has a group a lane on the way all the time.
        gaps, anchors, a, b, c, d = _load_groups(
            words_ptr, stride, gaps_ptr, anchors_ptr, done + lane, count, dtype, ONCE
        )
        low, high, ahead = _add_half(low, high, x_ptrs, near, first, W, dtype, PAIRS)
        x_ptrs += (ahead * W)[:, None]
        low, high, _ = _add_half(low, high, x_ptrs, far, second, W, dtype, PAIRS)
    _finish(low, high, rows_ptr, bias_ptr, y_ptr, block, first_token, m, tokens, T, W, ROWS, GROUPS, HAS_BIAS)


@triton.jit
def _finish(
    low,
    high,
    rows_ptr,
    bias_ptr,
    y_ptr,
    block,
    first_token,
    m,
    tokens,
    T: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Group k of row r is number k * ROWS + r and a round of the loop takes whole multiples of ROWS: sum over k."""
    sums = tl.sum(tl.reshape(low, (GROUPS // ROWS, ROWS, W)), axis=0)
    if W < T:
        sums = tl.join(sums, tl.sum(tl.reshape(high, (GROUPS // ROWS, ROWS, W)), axis=0))
    sums = tl.reshape(sums, (ROWS, T))
    ranks = block * ROWS + tl.arange(0, ROWS)
    rows = tl.load(rows_ptr + ranks, mask=ranks < m, other=0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=ranks < m, other=0.0).to(tl.float32)[:, None]
    token = first_token + tl.arange(0, T)
    y = y_ptr + token.to(tl.int64)[None, :] * m + rows[:, None]
    tl.store(y, cast(sums, y_ptr.dtype.element_ty), mask=(ranks < m)[:, None] & (token < tokens)[None, :])


@triton.jit
def _ahead(gaps, slot):
    """Columns from the anchor of a group to one of its slots: gaps int64 [N, K], slot int32 [N, 1] -> int32 [N, K]."""
    near, far = gaps.to(tl.uint32), (gaps >> 32).to(tl.uint32)
    _, near_odd = _running_sums(near)
    even, odd = _running_sums(tl.where(slot < 8, near, far))
    sums = tl.where(slot % 2 == 0, even, odd)
    ahead = ((sums >> (slot % 8 // 2 * 8).to(tl.uint32)) & 255).to(tl.int32)
    return ahead + tl.where(slot < 8, 0, (near_odd >> 24).to(tl.int32))


@triton.jit
def expand_kernel(
    bits_ptr,
    gaps_ptr,
    anchors_ptr,
    starts_ptr,
    rows_ptr,
    out_ptr,
    m,
    n,
    groups,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Write one block of rows of the dense weight, values as integers of their size: zeros, then what is kept.

    The slots of a group are neighbouring lanes: what they write lies in a few sectors of 32 bytes. (One group a lane,
    as in the product, wrote a sector for every weight: 540 us instead of 125 for 14336 x 4096 at 50 % on an H100.)
    """
    tl.static_assert(EACH * WARPS * 32 % (SLOTS * ROWS) == 0, "a round takes whole multiples of ROWS groups")
    GROUPS: tl.constexpr = EACH * WARPS * 32 // SLOTS
    CLEARED: tl.constexpr = PIECE * 32 * WARPS  # columns of a row that are set to zero at a time
    block = tl.program_id(0)
    start = tl.multiple_of(tl.load(starts_ptr + block), ROWS)
    count = (tl.load(starts_ptr + block + 1) - start).to(tl.int32)
    for rank in tl.static_range(ROWS):
        if block * ROWS + rank < m:
            row = tl.load(rows_ptr + block * ROWS + rank).to(tl.int64)
            for first in range(0, n, CLEARED):
                column = first + tl.arange(0, CLEARED)
                zeros = tl.zeros((CLEARED,), dtype=out_ptr.dtype.element_ty)
                tl.store(out_ptr + row * n + column, zeros, mask=column < n)
    tl.debug_barrier()
    lane = tl.arange(0, 32 * WARPS)[:, None]
    group, slot = lane // SLOTS, lane % SLOTS
    group += tl.arange(0, EACH)[None, :] * (GROUPS // EACH)
    bits_ptr += start * PIECE + slot // PIECE * (groups.to(tl.int64) * PIECE) + slot % PIECE
    gaps_ptr += start
    anchors_ptr += start
    ranks = block * ROWS + group % ROWS
    rows = tl.load(rows_ptr + ranks, mask=ranks < m, other=0).to(tl.int64)
    for done in range(0, count, GROUPS):
        q = done + group
        live = q < count
        gaps = tl.load(gaps_ptr + q, mask=live, other=0)
        column = _columns(tl.load(anchors_ptr + q, mask=live, other=0)) + _ahead(gaps, slot)
        bits = tl.load(bits_ptr + q * PIECE, mask=live, other=0)
        # Fillers are +0.0 and may lie on the column of a kept weight: only what has a bit set is written.
        tl.store(out_ptr + rows * n + column, bits, mask=live & (bits != 0))


def linear(x: Tensor, weight: Sections, bias: Tensor | None, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m], float32 sums; all of one dtype.

    Any number of tokens, ``TOKENS`` at a time: the work grows with every such pass, the traffic of memory does not.
    """
    flat = x.detach().reshape(-1, n)
    tokens = flat.shape[0]
    y = torch.empty((*x.shape[:-1], m), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    together = min(TOKENS, triton.next_power_of_2(tokens))
    passes = triton.cdiv(tokens, together)
    if together > 1:
        flat = F.pad(flat, (0, 0, 0, passes * together - tokens)) if tokens % together else flat
        flat = flat.view(passes, together, n).transpose(1, 2).contiguous().view(-1)
        flat = flat if x.dtype == torch.float32 else flat.view(torch.int32)
    warps = fitting_warps(weight.blocks, together, configs.processors(x.device))
    options = configs.config("d4", m, n, tokens, x.device, num_warps=warps, num_stages=1)
    with on_device(x):
        gemv_kernel[(weight.blocks * passes,)](
            flat.contiguous(),
            weight.values.view(torch.int32),
            weight.gaps,
            weight.anchors,
            weight.starts,
            weight.rows,
            y if bias is None else bias.detach().contiguous(),
            y,
            m,
            n,
            weight.groups,
            tokens,
            passes,
            T=together,
            dtype=FLOATS[x.dtype],
            ROWS=ROWS,
            HAS_BIAS=bias is not None,
            GROUPS=32 * options["num_warps"],
            ONCE=passes == 1,
            **options,
        )
    return y


def fitting_warps(blocks: int, tokens: int, processors: int) -> int:
    """Warps of a program: a power of two that gives all multiprocessors ``WARPS`` at a time."""
    wanted = (WARPS if tokens < TOKENS else WARPS_OF_MANY_TOKENS) * processors // max(1, blocks)
    return 1 << min(max(wanted, 1), MOST_WARPS).bit_length() - 1


def expand(weight: Sections, m: int, n: int, out: Tensor) -> Tensor:
    """Fill the contiguous ``out`` [m, n], of the dtype that was packed, with the dense weight."""
    default = next(options for limit, options in EXPAND.items() if limit is None or n <= limit)
    options = configs.config("d4_expand", m, n, 0, out.device, **default)
    bits = BITS[out.element_size()]
    with on_device(out):
        expand_kernel[(weight.blocks,)](
            weight.values.view(bits),
            weight.gaps,
            weight.anchors,
            weight.starts,
            weight.rows,
            out.view(bits),
            m,
            n,
            weight.groups,
            ROWS=ROWS,
            SLOTS=SLOTS,
            PIECE=weight.values.shape[2],
            WARPS=options["num_warps"],
            **options,
        )
    return out


# Dense weights per kept one in the instruction counts of the compile test: 50 % sparsity. Fewer are kept, fewer count.
COUNTED_AT = 2


def compile_specs() -> list[configs.Spec]:
    """Every number of tokens in bfloat16, every shipped configuration, other dtypes and wide columns once."""
    every = [dict(num_warps=1 << power, num_stages=1) for power in range(MOST_WARPS.bit_length())]
    few, many = every[1], every[-1]
    specs = [_spec("d4", torch.bfloat16, 1, options) for options in every]
    specs += [_spec("d4", torch.bfloat16, tokens, options) for tokens in (2, 4, 8) for options in (every[0], few, many)]
    specs += [_spec("d4", torch.float16, 1, many), _spec("d4", torch.float32, 8, few)]
    specs.append(_spec("d4", torch.bfloat16, 1, few, columns=1 << 17))
    for options in EXPAND.values():
        specs += [_spec("d4_expand", dtype, 1, options) for dtype in (torch.bfloat16, torch.float32)]
    for kernel, numbers in (("d4", (1, 2, 4, 8)), ("d4_expand", (1,))):
        for options in configs.shipped(kernel):
            specs += [_spec(kernel, torch.bfloat16, tokens, options, shipped=True) for tokens in numbers]
    return list({spec.name: spec for spec in specs}.values())


def _spec(
    kernel: str, dtype: torch.dtype, tokens: int, options: dict, columns: int = 4096, shipped: bool = False
) -> configs.Spec:
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    anchors = "*i16" if anchor_dtype(columns) == torch.int16 else "*i32"
    signature = {"words_ptr": "*i32", "gaps_ptr": "*i64", "anchors_ptr": anchors, "starts_ptr": "*i64"}
    signature |= {"rows_ptr": "*i32", "m": "i32", "n": "i32", "groups": "i32"}
    sizes: dict = {"ROWS": ROWS}
    if kernel == "d4":
        words = "*i32" if tokens > 1 and dtype.itemsize == 2 else f"*{kind}"
        signature |= {"x_ptr": words, "bias_ptr": f"*{kind}", "y_ptr": f"*{kind}", "tokens": "i32", "passes": "i32"}
        sizes |= {"T": tokens, "HAS_BIAS": True, "dtype": FLOATS[dtype], "GROUPS": 32 * options["num_warps"]}
        sizes |= {"ONCE": True}
        weights = 32 * options["num_warps"] * SLOTS * COUNTED_AT
    else:
        bits = f"*i{8 * dtype.itemsize}"
        signature = {name: type_ for name, type_ in signature.items() if name != "words_ptr"}
        signature |= {"bits_ptr": bits, "out_ptr": bits}
        sizes |= {"SLOTS": SLOTS, "PIECE": PIECE_BYTES // dtype.itemsize}
        sizes |= {"WARPS": options["num_warps"]}
        weights = options["EACH"] * 32 * options["num_warps"] * COUNTED_AT
    given = ",".join(f"{name.lower()}{value}" for name, value in options.items() if name != "num_stages")
    return configs.Spec(
        name=f"{kernel}[{kind},{f't{tokens},' if kernel == 'd4' else ''}{anchors[1:]},{given}]",
        kernel=gemv_kernel if kernel == "d4" else expand_kernel,
        signature=signature,
        constexprs={**sizes, **configs.constexprs(options)},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        weights_per_iteration=weights,
        config=kernel if shipped else "",
    )
