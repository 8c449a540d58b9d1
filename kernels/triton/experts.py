"""Mixtures of experts on canonical tensors: grouped products whose tiles of W are decoded in registers.

Tokens are grouped by expert on the device (``route``); a program takes a block of BT tokens of one expert and BN rows
of that expert's part of the tall weight. Two launches, up with the activation and down, then the sum over a token's
experts. Every element is written by one program and summed in the order of ``ids``: results repeat bit for bit.

Graph-safe: nothing waits for the device and every size is known from the shapes, so the number of blocks is the most
that any routing needs, and programs of blocks that this one does not need end at once. That is also why these kernels
are used for any number of tokens on every GPU, measured or not, where ``linear`` is not (``dispatch``): the dense ways
either ask the device which experts were chosen, which no CUDA graph can, or expand all experts at every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.kernels.experts import ACTIVATIONS, is_gated
from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.language import BLOCK, cast, dot, load_tile
from sparse_rt.kernels.triton.tiles import on_device, rows_contiguous, tile_arguments

# By the number of tokens that an expert gets on average. Of BN rows of a gated ``up`` half are those of the gate.
DEFAULTS = (
    (16, dict(BN=32, BT=16, num_warps=4, num_stages=3)),
    (32, dict(BN=64, BT=32, num_warps=4, num_stages=3)),
    (None, dict(BN=64, BT=64, num_warps=4, num_stages=3)),
)
SUM_COLUMNS = 1024


class Routing(NamedTuple):
    """Which assignments (positions in the flattened ids) a block of tokens holds; all on the device of the ids."""

    order: Tensor  # int64 [assignments]: sorted by expert, stable; those without an expert at both ends
    starts: Tensor  # int32 [experts + 1]: where the assignments of an expert start in ``order``
    ends: Tensor  # int32 [experts]: number of blocks of this expert and all before it
    expert: Tensor  # int32 [blocks]: the expert of a block, ``experts`` where there is no such block


@triton.jit
def experts_kernel(
    x_ptr,
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    y_ptr,
    order_ptr,
    groups_ptr,
    ends_ptr,
    expert_ptr,
    experts,
    per_row,
    m,
    n,
    stride_x,
    meta_stride,
    BN: tl.constexpr,
    BT: tl.constexpr,
    NIBBLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [assignments, m] = f(W_e x): x [assignments / per_row, n]; W_e (m, n), with a gate (2 m, n).

    Blocks are on the first axis: its size has no limit, and neighbours read the same rows of a weight. Rows of the tall
    weight and assignments are counted in 31 bits, elements in 64.
    """
    block = tl.program_id(0)
    expert = tl.load(expert_ptr + block)
    if expert >= experts:
        return
    HALF: tl.constexpr = BN // 2 if GATED else BN
    first, stop = tl.load(groups_ptr + expert), tl.load(groups_ptr + expert + 1)
    slot = first + (block - tl.load(ends_ptr + expert) + tl.cdiv(stop - first, BT)) * BT + tl.arange(0, BT)
    # Beyond the last token or row of an expert the last one is taken again, and not stored: masks cost registers.
    token = tl.load(order_ptr + tl.minimum(slot, stop - 1)).to(tl.int32) // per_row
    x_rows = x_ptr + token.to(tl.int64) * stride_x
    # Of a gated tile the first half is of the gate, the second of the projection.
    inner = tl.arange(0, BN)
    row = tl.minimum(tl.program_id(1) * HALF + inner % HALF, m - 1)
    rows = (expert * (BN // HALF) + inner // HALF) * m + row
    row_mask = tl.full((BN,), 1, dtype=tl.int1)
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for part in range(0, tl.cdiv(n, BLOCK)):
        weights = load_tile(
            values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, part, m, n, meta_stride, BN, NIBBLES
        )
        columns = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_rows[:, None] + columns[None, :], mask=(columns < n)[None, :], other=0.0)
        total = dot(cast(weights, x.dtype), tl.trans(x), total)
    result = _combine(total, ACTIVATION, GATED, HALF, BT, y_ptr.dtype.element_ty)
    row = tl.program_id(1) * HALF + tl.arange(0, HALF)
    # Read again: held over the loop it would not fit into the registers.
    assignment = tl.load(order_ptr + slot, mask=slot < stop, other=0)
    y = y_ptr + assignment[None, :] * m + row[:, None]
    tl.store(y, result, mask=(row < m)[:, None] & (slot < stop)[None, :])


@triton.jit
def _combine(
    total, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, dtype: tl.constexpr
):
    """Sums [BN, BT] -> what is stored of them in ``dtype``: [HALF, BT]."""
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, HALF, BT)), (1, 2, 0)))
        return cast(_activate(gate, ACTIVATION, dtype).to(tl.float32) * cast(up, dtype).to(tl.float32), dtype)
    else:
        return _activate(total, ACTIVATION, dtype)


@triton.jit
def _activate(total, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """The function of float32 sums, in ``dtype``: rounded to it before and after, as ``kernels.experts.activate``."""
    h = cast(total, dtype)
    x = h.to(tl.float32)
    if ACTIVATION == "silu":
        return cast(x * tl.sigmoid(x), dtype)
    elif ACTIVATION == "gelu":
        return cast(0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)), dtype)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return cast(x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)), dtype)
    elif ACTIVATION == "relu2":
        # Not maximum(x, 0), which forgets NaN.
        x = tl.where(x < 0.0, 0.0, x)
        return cast(x * x, dtype)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return h


@triton.jit
def sum_kernel(out_ptr, weights_ptr, ids_ptr, y_ptr, experts, k, n, BC: tl.constexpr):
    """y [tokens, n] = sum over j of weights[t, j] out[t k + j] in float32, where ids[t, j] is an expert."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), dtype=tl.float32)
    for j in range(0, k):
        assignment = token.to(tl.int64) * k + j
        expert = tl.load(ids_ptr + assignment)
        if (expert >= 0) & (expert < experts):  # otherwise nothing was written there
            out = tl.load(out_ptr + assignment * n + columns, mask=columns < n, other=0.0).to(tl.float32)
            total += out * tl.load(weights_ptr + assignment).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * n + columns, cast(total, y_ptr.dtype.element_ty), mask=columns < n)


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up_values: Tensor,
    up_metadata: Tensor,
    down_values: Tensor,
    down_metadata: Tensor,
    up_pattern: str,
    down_pattern: str,
    experts: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    """As the op of this name; ids that are no expert's add nothing. Values are rounded to the dtype of x on load."""
    (tokens, hidden), k, gated = x.shape, ids.shape[-1], is_gated(activation)
    if 0 in (tokens, hidden, k, experts, intermediate):
        return torch.zeros((tokens, hidden), dtype=x.dtype, device=x.device)
    options = launch_options(intermediate, hidden, -(-tokens * k // experts), x.device)
    routing = route(ids, experts, options["BT"])
    up = tile_arguments(up_metadata, up_pattern, experts * intermediate * (2 if gated else 1), hidden)
    down = tile_arguments(down_metadata, down_pattern, experts * hidden, intermediate)
    h = torch.empty((tokens * k, intermediate), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens * k, hidden), dtype=x.dtype, device=x.device)
    y = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    function = activation.removesuffix("_no_mul")
    with on_device(x):
        _product(rows_contiguous(x, hidden), k, up_values, up, routing, h, options, function, gated)
        _product(h, 1, down_values, down, routing, out, options, "none", False)
        sum_kernel[tokens, triton.cdiv(hidden, SUM_COLUMNS)](
            out, weights.contiguous(), ids.contiguous(), y, experts, k, hidden, BC=SUM_COLUMNS
        )
    return y


def _product(x, per_row, values, weight, routing, y, options, function, gated) -> None:
    m = y.shape[1]
    rows = options["BN"] // 2 if gated else options["BN"]
    experts_kernel[routing.expert.numel(), triton.cdiv(m, rows)](
        x,
        values.detach().contiguous(),
        weight.meta,
        weight.starts,
        weight.offsets,
        y,
        *routing,
        routing.ends.numel(),
        per_row,
        m,
        x.shape[1],
        x.stride(0),
        weight.meta_stride,
        NIBBLES=weight.nibbles,
        ACTIVATION=function,
        GATED=gated,
        **options,
    )


def route(ids: Tensor, experts: int, block: int) -> Routing:
    """ids integer [tokens, k] -> what each block of at most ``block`` assignments of one expert holds.

    Stable, and without waiting for the device; ids below 0 or from ``experts`` on are in no block.
    """
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    edges = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ordered, edges, out_int32=True)
    ends = ((starts.diff() + (block - 1)) // block).cumsum(0, dtype=torch.int32)
    blocks = torch.arange(most_blocks(ids.numel(), experts, block), dtype=torch.int32, device=ids.device)
    return Routing(order, starts, ends, torch.searchsorted(ends, blocks, right=True, out_int32=True))


def most_blocks(assignments: int, experts: int, block: int) -> int:
    """The most blocks that any routing fills: one for each expert, and one for every further ``block`` assignments."""
    chosen = min(assignments, experts)
    return chosen + (assignments - chosen) // block


def launch_options(intermediate: int, hidden: int, tokens: int, device: torch.device) -> dict:
    """Options of both launches, which share their blocks of tokens; ``tokens`` is what an expert gets on average."""
    default = next(options for limit, options in DEFAULTS if limit is None or tokens <= limit)
    return configs.config("experts", intermediate, hidden, tokens, device, **default)


def compile_specs() -> list[configs.Spec]:
    """Up with SiLU and down for every default and shipped configuration in bfloat16; all else once."""
    shipped = configs.shipped("experts")
    specs = []
    for options in shipped + [options for _, options in DEFAULTS if options not in shipped]:
        for nibbles in (False, True):
            for stage in ("silu", "down"):
                specs.append(_spec(stage, "bf16", nibbles, options, options in shipped))
    options = DEFAULTS[0][1]
    specs += [_spec(stage, "bf16", False, options) for stage in ACTIVATIONS if stage != "silu"]
    specs += [_spec("silu", "fp16", True, options), _spec("silu", "fp32", False, options)]
    specs.append(_spec("silu", "bf16", False, options, values="fp32"))
    return [*specs, _sum_spec("bf16", "i32"), _sum_spec("fp32", "i64")]


def _spec(
    stage: str, dtype: str, nibbles: bool, options: dict, shipped: bool = False, values: str = ""
) -> configs.Spec:
    index = "*i32" if nibbles else "*i64"  # launches with 2:4 pass the metadata for the index that they do not read
    pointers = ("x_ptr", "values_ptr", "meta_ptr", "starts_ptr", "offsets_ptr", "y_ptr")
    tables = {"order_ptr": "*i64", "groups_ptr": "*i32", "ends_ptr": "*i32", "expert_ptr": "*i32"}
    numbers = ("experts", "per_row", "m", "n", "stride_x", "meta_stride")
    signature = dict.fromkeys(pointers, f"*{dtype}") | tables | dict.fromkeys(numbers, "i32")
    signature |= {"values_ptr": f"*{values or dtype}", "meta_ptr": "*i32", "starts_ptr": index, "offsets_ptr": "*i32"}
    up = stage != "down"
    activation = {"ACTIVATION": stage.removesuffix("_no_mul") if up else "none", "GATED": up and is_gated(stage)}
    kind = f"{dtype}{',wide' if values not in ('', dtype) else ''},{'2:4' if nibbles else 'bitmask'},{stage}"
    return configs.Spec(
        name=f"experts[{kind},{options['BN']}x{options['BT']}w{options['num_warps']}]",
        kernel=experts_kernel,
        signature=signature,
        constexprs={**configs.constexprs(options), "NIBBLES": nibbles, **activation},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        weights_per_iteration=options["BN"] * BLOCK.value,
        expects=() if dtype == "fp32" else ("HMMA|HGMMA|UTCHMMA",),
        config="experts" if shipped else "",
        divisible=(*pointers, *tables, "m", "n", "stride_x", "meta_stride"),
    )


def _sum_spec(dtype: str, ids: str) -> configs.Spec:
    pointers = {"out_ptr": f"*{dtype}", "weights_ptr": "*fp32", "ids_ptr": f"*{ids}", "y_ptr": f"*{dtype}"}
    return configs.Spec(
        name=f"experts_sum[{dtype},{ids}]",
        kernel=sum_kernel,
        signature=pointers | dict.fromkeys(("experts", "k", "n"), "i32"),
        constexprs={"BC": SUM_COLUMNS},
        num_stages=1,
    )
