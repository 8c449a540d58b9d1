"""2:4 weights in fragment order, for few tokens: the sparse tensor cores do all the decoding.

A lane reads 16 bytes of weights and has the registers of one mma.sp::ordered_metadata.sync.aligned.m16n8k32, weights in
its first operand and 8 tokens in the second. Nothing passes through shared memory but the last sum over the warps.
Compiled for sm_90 the main loop takes 0.63 thread-instructions a dense weight (0.41 with two row tiles, which share x);
an H200 can issue 8.8 in the time that it takes to read one (1.125 bytes at 4.3 TB/s). What counts is therefore how many
bytes are under way: a warp asks for a whole unit (16 rows by 256 columns, 4.6 KB) while it multiplies the one before.

A program is ROW_TILES row tiles by all tokens; its warps (and SPLIT programs, where the weight has few rows) share the
columns. The Gluon kernel is needed because only there the layout of the registers can be said; it does not run in the
interpreter, so tests/kernels/triton runs its PTX. ``expand`` is plain Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_rt.errors import BackendError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.fragments import COLUMNS, DTYPES, ROWS, TILES, shapes

MAX_TOKENS = 16
MAX_WARPS = 16
# Measured on an H100, four shapes (benchmarks/gpu_tune.py): two row tiles share x, which pays from 9 tokens on where
# there are programs enough, with fewer warps where there are many.
DEFAULTS = (dict(ROW_TILES=1, num_warps=4), dict(ROW_TILES=2, num_warps=4), dict(ROW_TILES=2, num_warps=2))

_COLUMNS = tl.constexpr(COLUMNS)
_TILES = tl.constexpr(TILES)
_UNIT_WORDS = tl.constexpr(TILES * 32 * 4)
_META_WORDS = tl.constexpr(32 * 4)
# A lane's half of a group of four: even lanes take the first two columns, odd lanes the last two.
_PICK = tl.constexpr(
    "prmt.b32 $0, $4, $5, $12; prmt.b32 $1, $6, $7, $12; prmt.b32 $2, $8, $9, $12; prmt.b32 $3, $10, $11, $12;"
)
_PICK_REGISTERS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 12))
_MMA_REGISTERS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 12 + ["f"] * 4))


@gluon.constexpr_function
def _mma(tile, fp16):
    """The instruction for one of a unit's eight tiles: operands d $0-3, a $4-7, b $8-11, metadata $12-15, c $16-19."""
    kind = "f16.f16" if fp16 else "bf16.bf16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.f32 "
        f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$16, $17, $18, $19}}, "
        f"${12 + tile // 2}, {tile % 2:#x};"
    )


@gluon.jit
def _weights(ptr):
    """The words of a unit's eight tiles: read once, so the first to leave the caches."""
    return (
        gl.load(ptr, eviction_policy="evict_first"),
        gl.load(ptr + 128, eviction_policy="evict_first"),
        gl.load(ptr + 256, eviction_policy="evict_first"),
        gl.load(ptr + 384, eviction_policy="evict_first"),
        gl.load(ptr + 512, eviction_policy="evict_first"),
        gl.load(ptr + 640, eviction_policy="evict_first"),
        gl.load(ptr + 768, eviction_policy="evict_first"),
        gl.load(ptr + 896, eviction_policy="evict_first"),
    )


@gluon.jit
def _pick(low, high, pick):
    return gl.inline_asm_elementwise(_PICK, _PICK_REGISTERS, [low, high, pick], dtype=gl.int32, is_pure=True, pack=4)


@gluon.jit
def _x_tile(ptr, pick, chunk, chunks, TILE: gl.constexpr, PARTIAL: gl.constexpr, EARLY: gl.constexpr):
    """A lane's part of x for a tile, twice 16 bytes (EARLY: the half it needs); PARTIAL: columns may lie outside."""
    if PARTIAL:
        low = gl.load(ptr + TILE * 16, mask=chunk + TILE * 4 < chunks, other=0)
        high = gl.load(ptr + (TILE * 16 + 8), mask=chunk + (TILE * 4 + 2) < chunks, other=0)
    else:
        low = gl.load(ptr + TILE * 16)
        high = gl.load(ptr + (TILE * 16 + 8))
    if EARLY:
        return _pick(low, high, pick)
    else:
        return (low, high)


@gluon.jit
def _x_unit(ptr, pick, chunk, chunks, PARTIAL: gl.constexpr, EARLY: gl.constexpr):
    return (
        _x_tile(ptr, pick, chunk, chunks, 0, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 1, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 2, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 3, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 4, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 5, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 6, PARTIAL, EARLY),
        _x_tile(ptr, pick, chunk, chunks, 7, PARTIAL, EARLY),
    )


@gluon.jit
def _multiply(acc, a, x, e, pick, FP16: gl.constexpr, EARLY: gl.constexpr):
    """acc + a unit of every row tile times its columns of x."""
    for tile in gl.static_range(_TILES):
        if EARLY:
            b = x[tile]
        else:
            b = _pick(x[tile][0], x[tile][1], pick)
        acc = gl.inline_asm_elementwise(
            _mma(tile, FP16),
            _MMA_REGISTERS,
            [gl.expand_dims(a[tile], 1), gl.expand_dims(b, 0), gl.expand_dims(e, 1), acc],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )
    return acc


@gluon.constexpr_function
def _layout(row_tiles, token_tiles, warps):
    """[row tile, token tile, thread, register]: row and token tiles are registers of every thread."""
    return gl.BlockedLayout([row_tiles, token_tiles, 1, 4], [1, 1, 32, 1], [1, 1, warps, 1], [3, 2, 1, 0])


@gluon.jit
def _operands(
    fragments_ptr,
    metadata_ptr,
    x_ptr,
    tokens,
    chunks,
    row_tiles,
    units,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Where every thread begins: unit of the weight and of x, addresses of both and of the metadata, its chunk of x.

    Row tiles, units and tokens beyond the last one repeat it; what comes of them is dropped at the end.
    """
    T: gl.constexpr = WARPS * 32
    A: gl.constexpr = gl.SliceLayout(1, _layout(ROW_TILES, TOKEN_TILES, WARPS))  # [row tile, thread, register]
    B: gl.constexpr = gl.SliceLayout(0, _layout(ROW_TILES, TOKEN_TILES, WARPS))  # [token tile, thread, register]
    a_tile = gl.arange(0, ROW_TILES, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    a_thread = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    a_word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    b_tile = gl.arange(0, TOKEN_TILES, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None]
    b_thread = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    b_word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]

    row_tile = gl.minimum(gl.program_id(0) * ROW_TILES + a_tile, row_tiles - 1).to(gl.int64)
    a_unit = gl.program_id(1) * WARPS + a_thread // 32
    x_unit = gl.program_id(1) * WARPS + b_thread // 32
    first = row_tile * units + gl.minimum(a_unit, units - 1)
    a_ptr = fragments_ptr + first * _UNIT_WORDS + (a_thread % 32 * 4 + a_word)
    e_ptr = metadata_ptr + first * _META_WORDS + (a_thread % 32 * 4 + a_word)
    token = gl.minimum(b_tile * 8 + b_thread % 32 // 4, tokens - 1)
    chunk = gl.minimum(x_unit, units - 1) * (_COLUMNS // 8) + b_thread % 4 // 2
    x_at = x_ptr + (token * chunks + chunk) * 4 + b_word
    pick = gl.where(b_thread % 2 == 0, 0x3210, 0x7654) + b_word * 0 + b_tile * 0
    return a_unit, x_unit, a_ptr, e_ptr, x_at, chunk, pick


# Not specialised: one binary serves every shape, the one that the tests run, and one token compiles nothing anew.
_NUMBERS = ("m", "tokens", "chunks", "row_tiles", "units")


@gluon.jit(do_not_specialize=_NUMBERS)
def mma_sp_kernel(
    fragments_ptr,
    metadata_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    m,
    tokens,
    chunks,
    row_tiles,
    units,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    SPLIT: gl.constexpr,
    RAGGED: gl.constexpr,
    PARTIAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    FP16: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y [tokens, m] = x W^T + bias; with SPLIT > 1 float32 parts [SPLIT, tokens, m] without bias.

    fragments, metadata, x: int32 words; a row of x is ``chunks`` times 16 bytes. Every pointer is 16-byte aligned.
    RAGGED: some warps have no unit in the last round. PARTIAL: the last unit has less than 256 columns of x.
    """
    STEP: gl.constexpr = WARPS * SPLIT  # units that one round of all warps covers
    # Which half of x is wanted is decided as late as possible, because deciding waits for x while no weights have been
    # asked for. With two token tiles that takes too many registers (196 instead of 132 in a lane).
    EARLY: gl.constexpr = TOKEN_TILES > 1
    L: gl.constexpr = _layout(ROW_TILES, TOKEN_TILES, WARPS)
    a_unit, x_unit, a_ptr, e_ptr, x_at, chunk, pick = _operands(
        fragments_ptr, metadata_ptr, x_ptr, tokens, chunks, row_tiles, units, ROW_TILES, TOKEN_TILES, WARPS
    )
    acc = gl.full([ROW_TILES, TOKEN_TILES, WARPS * 32, 4], 0.0, gl.float32, L)
    a = _weights(a_ptr)
    e = gl.load(e_ptr, eviction_policy="evict_first")
    x = _x_unit(x_at, pick, chunk, chunks, PARTIAL, EARLY)
    # The registers of a tile are filled for the next round as soon as they have been multiplied, weights and x alike:
    # a warp has a unit (4.6 KB a row tile) under way all the time and waits for memory once a round.
    for _ in range(1, gl.cdiv(units, STEP)):
        acc = _multiply(acc, a, x, e, pick, FP16, EARLY)
        if RAGGED:
            a_ahead, x_ahead = gl.minimum(units - 1 - a_unit, STEP), gl.minimum(units - 1 - x_unit, STEP)
        else:
            a_ahead, x_ahead = STEP, STEP
        a_unit += STEP
        x_unit += STEP
        a_ptr += a_ahead * _UNIT_WORDS
        e_ptr += a_ahead * _META_WORDS
        x_at += x_ahead * (_COLUMNS // 2)
        chunk += x_ahead * (_COLUMNS // 8)
        a = _weights(a_ptr)
        e = gl.load(e_ptr, eviction_policy="evict_first")
        x = _x_unit(x_at, pick, chunk, chunks, PARTIAL, EARLY)
    last = _multiply(acc, a, x, e, pick, FP16, EARLY)
    if RAGGED:
        last = gl.where(gl.expand_dims(a_unit < units, 1), last, acc)
    _finish(last, bias_ptr, y_ptr, m, tokens, ROW_TILES, TOKEN_TILES, SPLIT, HAS_BIAS, WARPS)


@gluon.jit
def _finish(
    acc,
    bias_ptr,
    y_ptr,
    m,
    tokens,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Sum over the warps, add the bias, round and store."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 1, 32, 1], [1, 1, 1, WARPS], [3, 2, 1, 0])
    parts = gl.reshape(acc, [ROW_TILES, TOKEN_TILES, WARPS, 32, 4])
    total = gl.convert_layout(gl.sum(parts, 2), OUT)
    J: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, OUT)))
    LANE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, OUT)))
    TOKENS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, OUT)))
    TILE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, OUT)))
    j = gl.arange(0, 4, J)[None, None, None, :]
    lane = gl.arange(0, 32, LANE)[None, None, :, None]
    token_tile = gl.arange(0, TOKEN_TILES, TOKENS)[None, :, None, None]
    row_tile = gl.program_id(0) * ROW_TILES + gl.arange(0, ROW_TILES, TILE)[:, None, None, None]
    row = row_tile * 16 + lane // 4 + j // 2 * 8
    token = token_tile * 8 + lane % 4 * 2 + j % 2
    if HAS_BIAS:
        total += gl.load(bias_ptr + row, mask=row < m, other=0.0).to(gl.float32)
    y = y_ptr + ((gl.program_id(1) * tokens + token).to(gl.int64) * m + row)
    gl.store(y, total.to(y_ptr.dtype.element_ty), mask=(row < m) & (token < tokens))


@triton.jit(do_not_specialize=("m", "tokens"))
def sum_parts_kernel(
    parts_ptr, bias_ptr, y_ptr, m, tokens, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [tokens, m] = the sum of parts [SPLIT, tokens, m] in their order, plus bias."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1).to(tl.int64) * m + row
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + part * tokens.to(tl.int64) * m + at, mask=row < m, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < m, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=row < m)


@triton.jit(do_not_specialize=("m", "n", "units"))
def expand_kernel(fragments_ptr, metadata_ptr, out_ptr, m, n, units, BLOCK: tl.constexpr):
    """The dense weight: a program is a unit, and writes the four columns of a group (two words) at a time."""
    row_tile = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1)
    base = row_tile * units + unit
    for start in tl.static_range(0, 16 * 64, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row, group = at // 64, at % 64
        tile, v, p, s = group // 8, group // 4 % 2, group // 2 % 2, group % 2
        lane = row % 8 * 4 + s * 2 + p
        pair = tl.load(fragments_ptr + base * _UNIT_WORDS + tile * 128 + lane * 4 + v * 2 + row // 8)
        holder = row % 8 * 4 + tile % 2 * 2 + v
        word = tl.load(metadata_ptr + base * _META_WORDS + holder * 4 + tile // 2)
        nibble = word >> (row // 8 * 16 + s * 8 + p * 4)
        first, second = nibble & 3, nibble >> 2 & 3
        # Weights as the low and the high half of a word, at their two of four columns.
        low, high = (pair & 0xFFFF) << (first & 1) * 16, (pair >> 16 & 0xFFFF) << (second & 1) * 16
        left = tl.where(first < 2, low, 0) | tl.where(second < 2, high, 0)
        right = tl.where(first < 2, 0, low) | tl.where(second < 2, 0, high)
        row_out, group_out = row_tile * 16 + row, unit * 64 + group
        inside = (row_out < m) & (group_out * 4 < n)
        out = out_ptr + row_out * (n // 2) + group_out * 2
        tl.store(out, left, mask=inside)
        tl.store(out + 1, right, mask=inside)


def refusal(tokens: int, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """None when ``linear`` can multiply these tokens, otherwise the reason."""
    if torch.device(device).type != "cuda":
        return f"the sparse tensor cores are on a GPU, the tensors are on {torch.device(device).type}"
    if dtype not in DTYPES:
        return f"the sparse tensor cores multiply bfloat16 and float16, not {str(dtype)[len('torch.') :]}"
    return None if tokens <= MAX_TOKENS else f"{tokens} tokens; more than {MAX_TOKENS} go through the dense weight"


@torch.no_grad()
def linear(x: Tensor, fragments: Tensor, metadata: Tensor, bias: Tensor | None, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x, float32 sums, at most 16 tokens.

    fragments, metadata: int32 tensors of ``pack_fragments`` (any shape), 16-byte aligned; x has the dtype that was
    packed. Raises ``BackendError`` for what ``refusal`` names.
    """
    tokens = x.numel() // max(n, 1)
    reason = refusal(tokens, x.dtype, x.device)
    if reason is not None:
        raise BackendError(f"mma_sp: {reason}")
    y = x.new_empty((*x.shape[:-1], m))
    if tokens == 0:
        return y
    flat = _aligned(x.detach().reshape(tokens, n))
    processors = configs.processors(x.device)
    options = configs.config("mma_sp", m, n, tokens, x.device, **default_options(m, tokens, processors))
    plan = launch_plan(m, n, tokens, options, processors)
    split = plan.pop("SPLIT")
    parts = y if split == 1 else scratch.buffer("mma_sp", (split, tokens, m), torch.float32, x.device)
    with torch.cuda.device(x.device):
        mma_sp_kernel[plan.pop("programs"), split](
            fragments,
            metadata,
            flat.view(torch.int32),
            y if bias is None else bias,
            parts,
            m,
            tokens,
            flat.shape[1] // 8,
            -(-m // ROWS),
            -(-n // COLUMNS),
            SPLIT=split,
            HAS_BIAS=bias is not None and split == 1,
            FP16=x.dtype == torch.float16,
            **plan,
        )
        if split > 1:
            sum_parts_kernel[triton.cdiv(m, 256), tokens](
                parts, y if bias is None else bias, y, m, tokens, SPLIT=split, HAS_BIAS=bias is not None, BLOCK=256
            )
    return y


def default_options(m: int, tokens: int, processors: int) -> dict:
    """Which of ``DEFAULTS`` a product gets that no file names."""
    row_tiles = -(-m // ROWS)
    if tokens <= 8 or row_tiles < processors:
        return DEFAULTS[0]
    return DEFAULTS[1 if row_tiles < 4 * processors else 2]


def launch_plan(m: int, n: int, tokens: int, options: dict, processors: int) -> dict:
    """Programs, SPLIT and the kernel's other options for a product.

    Where there is a program for fewer than a quarter of the multiprocessors, programs get more warps, then (without a
    "SPLIT" in ``options``) columns are split, never finer than a unit a warp: a split costs another kernel, and was
    slower for 64 programs on 132 multiprocessors. Warps that would have no unit are left out.
    """
    row_tiles, units = -(-m // ROWS), -(-n // COLUMNS)
    warps = options["num_warps"]
    while warps > units:
        warps //= 2
    programs, token_tiles = triton.cdiv(row_tiles, options["ROW_TILES"]), 1 if tokens <= 8 else 2
    split, lacking = options.get("SPLIT", 0), 4 * programs < processors
    # More warps than these would not leave a lane its registers.
    while lacking and not split and 2 * warps <= min(units, MAX_WARPS // token_tiles):
        warps *= 2
    split = split or (max(1, min(processors // programs, units // warps)) if lacking else 1)
    return dict(
        programs=programs,
        SPLIT=split,
        ROW_TILES=options["ROW_TILES"],
        TOKEN_TILES=token_tiles,
        RAGGED=units % (warps * split) != 0,
        PARTIAL=n % COLUMNS != 0,
        WARPS=warps,
        num_warps=warps,
    )


def expand(fragments: Tensor, metadata: Tensor, m: int, n: int, out: Tensor) -> Tensor:
    """Fill the contiguous ``out`` [m, n] (bfloat16 or float16, as packed) with the dense weight."""
    row_tiles, units = shapes(m, n)[1][:2]
    flat = out.view(torch.int32)
    expand_kernel[row_tiles, units](fragments, metadata, flat, m, n, units, BLOCK=512, num_warps=4)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x [tokens, n] with rows of whole 16 bytes at 16-byte addresses."""
    if x.shape[1] % 8:
        x = F.pad(x, (0, -x.shape[1] % 8))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def compile_specs() -> list[configs.Spec]:
    """Every shipped configuration for 1 to 8 and 9 to 16 tokens; float16, ragged shapes and split columns once."""
    shipped = configs.shipped("mma_sp")
    found = [*shipped, *(options for options in DEFAULTS if options not in shipped)]
    specs = []
    for options in found:
        given = dict(row_tiles=options["ROW_TILES"], warps=options["num_warps"], split=options.get("SPLIT") or 1)
        for token_tiles in (1, 2):
            specs.append(spec(token_tiles=token_tiles, config="mma_sp" if options in shipped else "", **given))
    specs.append(spec(dtype="fp16", ragged=True))
    specs.append(spec(warps=MAX_WARPS))
    specs.append(spec(token_tiles=2, warps=4, split=4, ragged=True, partial=True))
    signature = {
        "fragments_ptr": "*i32",
        "metadata_ptr": "*i32",
        "out_ptr": "*i32",
        "m": "i32",
        "n": "i32",
        "units": "i32",
    }
    specs.append(configs.Spec("mma_sp_expand", expand_kernel, signature, {"BLOCK": 512}))
    signature = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "m": "i32", "tokens": "i32"}
    constants = {"SPLIT": 4, "HAS_BIAS": True, "BLOCK": 256}
    specs.append(configs.Spec("mma_sp_sum_parts", sum_parts_kernel, signature, constants))
    return specs


def spec(
    dtype: str = "bf16",
    row_tiles: int = 1,
    warps: int = 8,
    token_tiles: int = 1,
    split: int = 1,
    ragged: bool = False,
    partial: bool = False,
    config: str = "",
) -> configs.Spec:
    """How to compile the kernel as ``linear`` launches it; unsplit with bias, split without."""
    pointers = {"fragments_ptr": "*i32", "metadata_ptr": "*i32", "x_ptr": "*i32", "bias_ptr": f"*{dtype}"}
    pointers["y_ptr"] = f"*{dtype}" if split == 1 else "*fp32"
    given = dict(ROW_TILES=row_tiles, TOKEN_TILES=token_tiles, SPLIT=split, RAGGED=ragged, PARTIAL=partial)
    shape = f"{row_tiles}x{token_tiles}w{warps}s{split}"
    return configs.Spec(
        name=f"mma_sp[{dtype},{shape}{',ragged' * ragged}{',partial' * partial}]",
        kernel=mma_sp_kernel,
        signature={**pointers, **dict.fromkeys(_NUMBERS, "i32")},
        constexprs={**given, "HAS_BIAS": split == 1, "FP16": dtype == "fp16", "WARPS": warps},
        num_warps=warps,
        weights_per_iteration=warps * row_tiles * ROWS * COLUMNS,
        expects=("HMMA.SP",),
        gluon=True,
        config=config,
        divisible=tuple(pointers),
    )
