"""The product with an adapted weight, and its gradient, without a dense gradient or a dense weight that stays.

An adapter is a differentiable map on the kept values (no PEFT in this file):

    effective = values + sum over the active adapters of update(values, positions, parameters)

The forward pass forms the effective values block by block in float32, rounds them once to the dtype of x, and keeps
none of them: only x, the adapter's parameters and references to values and metadata are saved. The backward pass forms
them again and pulls dY^T X at the kept positions back through the map, one block of rows at a time: three products of
the size of the layer in all (y, dX, dY^T X), as in "route F" of the SPP derivation.

Positions are derived from the metadata block by block. Keeping them would cost 4 bytes a kept value (int32 columns)
beside the 2.25 bytes that a bfloat16 value with its share of the 50% metadata takes; deriving them costs one pass over
the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels import ops, scratch

# Elements of a dense block (float32): 4 MB stay in a core's cache, an accelerator wants fewer and larger launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ACCELERATOR = 1 << 24


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` of a weight, and where their values lie in the flattened values."""

    start: int
    stop: int
    begin: int
    end: int


def row_blocks(pattern: str, metadata: Tensor, m: int, n: int) -> tuple[Block, ...]:
    """Cut a weight (m, n) into blocks of rows; reads the counts of kept values, so keep the result."""
    fmt = get_format(pattern)
    rows = max(1, BLOCK_ELEMENTS.get(metadata.device.type, BLOCK_ELEMENTS_ACCELERATOR) // max(n, 1))
    blocks, begin = [], 0
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        end = begin + fmt.num_values(metadata[start:stop], stop - start, n)
        blocks.append(Block(start, stop, begin, end))
        begin = end
    return tuple(blocks)


class WeightShape(NamedTuple):
    """What an adapter's parameters depend on: a weight (m, n) of ``pattern`` that keeps ``nnz`` of its elements."""

    m: int
    n: int
    pattern: str
    nnz: int

    @classmethod
    def vector(cls, width: int) -> WeightShape:
        """Of the weight of a norm, which is not compressed."""
        return cls(width, 1, "dense", width)


@dataclass(frozen=True)
class Rows:
    """One block of a weight as an update sees it: ``values`` in the compute dtype and the rows they belong to.

    They begin at ``begin`` in the flattened values of the weight.
    """

    start: int
    stop: int
    begin: int
    m: int
    n: int
    pattern: str
    values: Tensor
    metadata: Tensor

    def kept(self, dense: Tensor) -> Tensor:
        """dense [stop - start, n] at the kept positions, in the shape of ``values``; differentiable."""
        return ops.gather(dense, self.metadata, self.pattern, self.stop - self.start, self.n, self.values)

    def part(self, whole: Tensor) -> Tensor:
        """This block's part of a tensor in the shape of all values; differentiable."""
        return whole.flatten()[self.begin : self.begin + self.values.numel()].view(self.values.shape)


@dataclass(frozen=True)
class Fused:
    """The same map as an ``Update.function`` in one pass over a whole weight, where there is a kernel for it.

    ``refusal(weight, *tensors)``              why it cannot run with these inputs and results, or None
    ``apply(weight, out, with_base, *parameters)``   effective values (or the update alone) into ``out``, rounded once;
                                               None: block by block, as without a kernel
    ``gradients(weight, dy, x, *parameters)``  of the parameters, float32
    """

    refusal: Callable[..., str | None]
    apply: Callable[..., object] | None
    gradients: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Update:
    """``function(rows, *parameters)`` -> what one adapter adds to ``rows.values``; ``fused`` is only a faster way."""

    function: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]
    fused: Fused | None = None


@dataclass(frozen=True)
class Weight:
    """A compressed weight (m, n) with its row blocks."""

    values: Tensor
    metadata: Tensor
    pattern: str
    m: int
    n: int
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Weight:
        return cls(values, metadata, pattern, m, n, row_blocks(pattern, metadata, m, n))

    def rows(self, block: Block, dtype: torch.dtype) -> Rows:
        shape = get_format(self.pattern).values_shape(block.stop - block.start, self.n, block.end - block.begin)
        values = self.values.detach().flatten()[block.begin : block.end].view(shape).to(dtype)
        metadata = self.metadata.detach()[block.start : block.stop]
        return Rows(block.start, block.stop, block.begin, self.m, self.n, self.pattern, values, metadata)


def compute_dtype(values: Tensor, updates: Sequence[Update]) -> torch.dtype:
    """float32, or float64 when anything is (gradient checks)."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    for update in updates:
        for parameter in update.parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def _fused(weight: Weight, updates: Sequence[Update], *tensors: Tensor) -> Fused | None:
    """The fused implementation of ``updates``: of one alone, computing in float32, with tensors it accepts."""
    fused = updates[0].fused if len(updates) == 1 else None
    if fused is None or compute_dtype(weight.values, updates) != torch.float32:
        return None
    return fused if fused.refusal(weight, *tensors) is None else None


def effective_values(
    weight: Weight,
    updates: Sequence[Update],
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    with_base: bool = True,
) -> Tensor:
    """values + updates in the shape of the values, computed in float32 and rounded once to ``dtype`` (default: theirs).

    ``out`` receives the result when given; without ``with_base`` it is the sum of the updates alone. No gradient; the
    dense block of one row block is the only temporary.
    """
    with torch.no_grad(), torch.autocast(weight.values.device.type, enabled=False):
        out = torch.empty_like(weight.values, dtype=dtype, requires_grad=False) if out is None else out
        fused = _fused(weight, updates, out)
        if fused is not None and fused.apply is not None:
            fused.apply(weight, out, with_base, *updates[0].parameters)
            return out
        return _block_by_block(weight, updates, out, compute_dtype(weight.values, updates), with_base)


def merged_values(weight: Weight, updates: Sequence[Update], dtype: torch.dtype | None = None) -> Tensor:
    """``effective_values`` to be kept: computed in float64, so that the result is the adapter's equation rounded.

    In float32 one of about 10,000 bfloat16 values lands on the other side of a rounding boundary.
    """
    with torch.no_grad(), torch.autocast(weight.values.device.type, enabled=False):
        out = torch.empty_like(weight.values, dtype=dtype, requires_grad=False)
        return _block_by_block(weight, updates, out, torch.float64, True)


def _block_by_block(
    weight: Weight, updates: Sequence[Update], out: Tensor, compute: torch.dtype, with_base: bool
) -> Tensor:
    flat = out.view(-1)
    for block in weight.blocks:
        flat[block.begin : block.end] = _apply(weight.rows(block, compute), updates, with_base).view(-1)
    return out


@torch.compiler.disable(reason="the backward pass differentiates block by block")
def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, updates: Sequence[Update], with_base: bool = True
) -> Tensor:
    """y = x (W + updates)^T + bias: x [..., n] -> [..., m]; without ``with_base`` only the updates' part of it.

    Gradients for x, bias and the updates' parameters (in their own dtype); values and metadata are frozen. Autocast
    casts x and bias as it does for ``nn.Linear``, and nothing else: the updates are computed in float32.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.to(x.dtype)
    parameters = tuple(parameter for update in updates for parameter in update.parameters)
    plan = _Plan(
        tuple((update.function, update.fused) for update in updates),
        tuple(len(update.parameters) for update in updates),
        with_base,
    )
    shape = weight.pattern, weight.m, weight.n, weight.blocks
    with torch.autocast(device, enabled=False):
        return _AdaptedLinear.apply(x, weight.values, weight.metadata, bias, shape, plan, *parameters)


@dataclass(frozen=True)
class _Plan:
    functions: tuple[tuple[Callable[..., Tensor], Fused | None], ...]
    counts: tuple[int, ...]
    with_base: bool

    def updates(self, parameters: Sequence[Tensor]) -> list[Update]:
        taken, updates = 0, []
        for (function, fused), count in zip(self.functions, self.counts, strict=True):
            updates.append(Update(function, tuple(parameters[taken : taken + count]), fused))
            taken += count
        return updates


def _apply(rows: Rows, updates: Sequence[Update], with_base: bool) -> Tensor:
    total = rows.values if with_base else None
    for update in updates:
        dtype = rows.values.dtype
        parameters = [p.to(dtype) if p.is_floating_point() else p for p in update.parameters]
        change = update.function(rows, *parameters)
        total = change if total is None else total + change
    return torch.zeros_like(rows.values) if total is None else total


def _room(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where effective values of one product go; on a CPU the same memory every time (fresh pages cost more)."""
    if values.device.type == "cpu":
        return scratch.buffer("effective", tuple(values.shape), dtype)
    return torch.empty(values.shape, dtype=dtype, device=values.device)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, metadata, bias, shape, plan, *parameters):
        ctx.save_for_backward(x, values, metadata, *parameters)
        ctx.shape, ctx.plan = shape, plan
        pattern, m, n, blocks = shape
        weight = Weight(values, metadata, pattern, m, n, blocks)
        out = effective_values(weight, plan.updates(parameters), out=_room(values, x.dtype), with_base=plan.with_base)
        return ops.linear(x, out, metadata, bias, pattern, m, n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, values, metadata, *parameters = ctx.saved_tensors
        pattern, m, n, blocks = ctx.shape
        need_x, _, _, need_bias, _, _, *need_parameters = ctx.needs_input_grad
        weight = Weight(values, metadata, pattern, m, n, blocks)
        out = _room(values, x.dtype) if need_x else None
        with torch.autocast(x.device.type, enabled=False):
            pull_back = _pull_back_fused if _fused(weight, ctx.plan.updates(parameters), x, dy) else _pull_back
            gradients = pull_back(dy, x, weight, ctx.plan, parameters, need_parameters, out)
            dx = ops.linear_t(dy, out, metadata, pattern, m, n) if need_x else None
        db = dy.flatten(0, -2).sum(0) if need_bias else None
        return dx, None, None, db, None, None, *gradients


def _pull_back(dy, x, weight: Weight, plan: _Plan, parameters, needed, out: Tensor | None) -> list[Tensor | None]:
    """Gradients of the parameters, and the effective values into ``out`` on the way (None: not wanted)."""
    leaves = [parameter.detach().requires_grad_(need) for parameter, need in zip(parameters, needed, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    updates = plan.updates(leaves)
    compute = compute_dtype(weight.values, updates)
    if wanted:
        like = weight.values.new_empty((), dtype=compute).expand(weight.values.shape)
        dv = ops.values_grad(dy, x, weight.metadata, weight.pattern, weight.m, weight.n, like).view(-1)
    sums: list[Tensor | None] = [None] * len(wanted)
    for block in weight.blocks:
        rows = weight.rows(block, compute)
        with torch.set_grad_enabled(bool(wanted)):
            effective = _apply(rows, updates, plan.with_base)
        if out is not None:
            out.view(-1)[block.begin : block.end] = effective.detach().view(-1)
        if wanted:
            pieces = torch.autograd.grad(effective, wanted, dv[block.begin : block.end].view(effective.shape))
            sums = [piece if total is None else total + piece for total, piece in zip(sums, pieces, strict=True)]
    found = iter(sums)
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _pull_back_fused(dy, x, weight: Weight, plan: _Plan, parameters, needed, out: Tensor | None) -> list[Tensor | None]:
    """The same with a fused implementation; the gradient of the values may never exist."""
    (update,) = plan.updates(parameters)
    if out is not None:
        effective_values(weight, [update], out=out, with_base=plan.with_base)
    if not any(needed):
        return [None] * len(needed)
    found = update.fused.gradients(weight, dy, x, *parameters)
    return [gradient.to(p.dtype) if need else None for p, gradient, need in zip(parameters, found, needed, strict=True)]
