"""Measurements of gpu_suite.py on single layers: decode, prefill and training steps against cuBLAS in the same run.

Every row was checked before it was timed: the relative RMS error to the float64 product of the same rounded weights is
at most 1.5 times that of cuBLAS on the unpruned weight. ``ratio`` is dense / sparse within a turn.

Paths of a product, each forced (``dispatch.forced``) whatever the dispatch table of this GPU says:

    scratch          what an unmeasured GPU does: the dense weight formed in scratch from values and metadata, cuBLAS
    linear           the kernel that decodes values and metadata as they are stored
    d4, mma_sp       the kernels of the layouts that serving makes at load
    d4 scratch, ...  products of those layouts that their kernels do not take: the dense weight formed from them
    cslt             cuSPARSELt through torch

``scratch_ratio`` is the time of ``scratch`` / the time of this path: the dispatch table (gpu_suite_table.py) uses a
kernel where it is above 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    Cell,
    Context,
    Row,
    Task,
    check_error,
    copies_for,
    figures,
    poison,
    product64,
    random_mask,
    random_weight,
    rms,
)
from gpu_timing import Calls, take_turns
from timing import ratio
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels import factors, ops
from sparse_rt.kernels.triton import dispatch, packed

DECODE_TOKENS, PREFILL_TOKENS, TRAINING_TOKENS = (1, 4, 8, 16, 64), (512, 2048, 8192), (4096,)
MOST_DECODE_TOKENS = DECODE_TOKENS[-1]  # beyond the bars; for dispatch
DRY_TOKENS = {"decode": (1, 3), "prefill": (80,), "training": (70,)}
DX_TOKENS, DRY_DX_TOKENS = (16, 512), (3,)
SAMPLED_TOKENS = 256  # of a long batch are compared with float64
# Shapes on which the kernels of stored weights, and 64 tokens, are timed too: dispatch needs them, no bar does.
CANONICAL_SHAPES = ("q/o", "gate/up")
KERNEL_TOKENS = 512  # the most that kernels without tensor-core speed are timed for
PREFILL_CELLS = ("2:4", "50%", "75%", "90%")
TRAINING_CELLS = PREFILL_CELLS
SPP_GROUPS, SPP_SCALE = 16, 1.0
LEARNING_RATE = 1e-4
DENSE = "dense"


class Sparse:
    """One weight pruned as ``cell`` says, its forms, and what its product is."""

    def __init__(self, weight: Tensor, cell: Cell, dry: bool):
        self.cell, self.dry, (self.m, self.n) = cell, dry, weight.shape
        mask = random_mask(cell, self.m, self.n, weight.device)
        self.values, self.metadata = get_format(cell.pattern).compress(weight, mask)
        self.dense = weight * mask

    @property
    def shape(self) -> tuple[str, int, int]:
        return self.cell.pattern, self.m, self.n

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.metadata.nbytes

    @functools.cached_property
    def packed_copies(self) -> dict[str, tuple[list[Tensor], Row]]:
        """Made by ``layout_copies``."""
        return {}

    def layout_copies(self, layout: str) -> tuple[list[Tensor], Row]:
        """A derived layout in as many copies as no cache holds, and what it is; it must come back bit for bit."""
        if layout not in self.packed_copies:
            made = packed.pack(self.values, self.metadata, *self.shape, layout)
            back = packed.unpack(made, *self.shape)
            if not all(torch.equal(a, b) for a, b in zip((self.values, self.metadata), back, strict=True)):
                raise ValueError("the packed weight does not come back bit for bit")
            facts = {"layout": packed.describe(made)["layout"], "sparse_bytes": made.nbytes}
            copies = [made, *(made.clone() for _ in range(copies_for(made.nbytes, self.dry) - 1))]
            for copy in copies:  # so that no product has to look at a header first
                packed.describe(copy)
            self.packed_copies[layout] = copies, facts
        return self.packed_copies[layout]

    @functools.cached_property
    def canonical_copies(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.values.clone(), self.metadata.clone()) for _ in range(copies_for(self.nbytes, self.dry))]

    def columns(self, path: str, x: Tensor) -> tuple[Calls, Row]:
        """One call per copy of the weight, and facts for the row."""
        kernel, _, way = path.partition(" ")
        kernels = () if "scratch" in (kernel, way) else (kernel,)
        if path == "cslt":
            return self.library_columns(x)
        if kernel in ("d4", "mma_sp"):
            copies, facts = self.layout_copies(kernel)
            calls = [forced(kernels, packed.linear, x, copy, None, self.m, self.n) for copy in copies]
            return calls, facts
        calls = [forced(kernels, ops.linear, x, *copy, None, *self.shape) for copy in self.canonical_copies]
        return calls, {"layout": "canonical", "sparse_bytes": self.nbytes}

    def library_columns(self, x: Tensor) -> tuple[Calls, Row]:
        """cuSPARSELt with the fastest of its algorithms for this shape and number of tokens."""
        from sparse_rt.kernels.triton import cslt

        reason = cslt.refusal(x.dtype, self.m, self.n)
        if reason is not None:
            raise ValueError(reason)
        blob = cslt.compress(self.values, self.metadata, self.m, self.n)
        times = cslt.sweep(blob, self.m, self.n, x.shape[0])
        calls = [partial(cslt.linear, x, copy, None, self.m, self.n) for copy in (blob, blob.clone())]
        fastest = min(times, key=times.__getitem__) if times else None
        facts = {"layout": "cuSPARSELt", "sparse_bytes": blob.nbytes, "algorithm": fastest, "algorithms": len(times)}
        return calls, facts


def tokens_of(context: Context, kind: str) -> tuple[int, ...]:
    if context.dry:
        return DRY_TOKENS[kind]
    return {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS, "training": TRAINING_TOKENS}[kind]


def tasks(kind: str, models: tuple[str, ...]) -> Callable[[Context], list[Task]]:
    """One task per shape of ``models``, in their order, for ``kind`` "decode", "prefill" or "training"."""

    def listed(context: Context) -> list[Task]:
        found = []
        for model in models:
            for layer, (m, n) in context.shapes.get(model, {}).items():
                run = training if kind == "training" else partial(products, kind=kind)
                fields = {"kind": kind, "model": model, "layer": layer, "m": m, "n": n}
                found.append(Task(f"{kind} {model} {layer} {m}x{n}", partial(run, fields=fields)))
        return found

    return listed


def products(context: Context, *, kind: str, fields: Row) -> None:
    """y = x W^T of one shape: all cells and numbers of tokens take turns with cuBLAS."""
    m, n, device = fields["m"], fields["n"], context.device
    weight = random_weight(m, n, torch.bfloat16, device)
    cells = [cell for cell in context.cells if kind == "decode" or str(cell) in PREFILL_CELLS]
    tokens_list = tokens_of(context, kind)
    inputs = {tokens: torch.randn(tokens, n, device=device).to(torch.bfloat16) for tokens in tokens_list}
    dense = [weight, *(weight.clone() for _ in range(copies_for(weight.nbytes, context.dry) - 1))]
    weights = {cell: Sparse(weight, cell, context.dry) for cell in cells}
    for tokens in tokens_list:
        if tokens == MOST_DECODE_TOKENS and fields["layer"] not in CANONICAL_SHAPES:
            continue
        if context.late():
            context.emit({**fields, "tokens": tokens, "kind": "skipped", "reason": "time"})
            continue
        one_number_of_tokens(context, kind, {**fields, "tokens": tokens}, inputs[tokens], dense, weights)


def paths_of(layer: str, tokens: int, cell: Cell, context: Context) -> tuple[str, ...]:
    """What is timed for a cell: "scratch" first, which all others are compared with."""
    from sparse_rt.kernels.triton import cslt, mma_sp

    if context.dry:
        return "scratch", "linear", "d4", "d4 scratch"
    canonical, sparse_cores = layer in CANONICAL_SHAPES, cell.pattern == "2:4"
    layout, found = "mma_sp" if sparse_cores else "d4", ["scratch"]
    if tokens <= (mma_sp.MAX_TOKENS if sparse_cores else KERNEL_TOKENS) and (tokens < KERNEL_TOKENS or canonical):
        found.append(layout)
    if canonical and tokens <= KERNEL_TOKENS:
        found.append("linear")
    if tokens >= KERNEL_TOKENS:
        found.append(f"{layout} scratch")
    if sparse_cores and cslt.refusal(torch.bfloat16, 16, 16) is None:
        found.append("cslt")
    return tuple(found)


@torch.no_grad()
def one_number_of_tokens(
    context: Context, kind: str, fields: Row, x: Tensor, dense: list[Tensor], weights: dict[Cell, Sparse]
) -> None:
    """Check every cell and path on ``x``, then time those that passed; one row each."""
    calls: dict[Any, Calls] = {DENSE: [partial(F.linear, x, copy) for copy in dense]}
    sample = sampled(x)
    dense_rms = rms(calls[DENSE][0]()[sample], product64(x[sample], dense[0]))
    facts: dict[Any, Row] = {}
    for cell, weight in weights.items():
        expected = product64(x[sample], weight.dense)
        for path in paths_of(fields["layer"], x.shape[0], cell, context):
            named = {**fields, **cell.fields, "path": path}

            def prepare(weight=weight, path=path, named=named, expected=expected, cell=cell):
                found, layout = weight.columns(path, x)
                poison(x.device, x.shape[0] * weight.m * x.element_size())
                error = rms(found[0]()[sample], expected)
                check_error(error, dense_rms, x.dtype)
                calls[cell, path] = found
                facts[cell, path] = {**named, **layout, "rms": {"dense": dense_rms, "sparse": error}}

            context.attempt(named, prepare)
    if not facts:
        return
    seconds = 0.0 if context.dry else (0.12 if kind == "decode" else 0.3)
    times, columns = take_turns(calls, x.device, seconds=seconds, min_turns=3 if context.dry else 11)
    for key, row in facts.items():
        found = {**figures(times, DENSE, key), **graph_facts(columns[key]), **against_scratch(times, key)}
        context.emit({**row, "dense_bytes": dense[0].nbytes, **found})


def against_scratch(times: dict[Any, list[float]], key: tuple[Cell, str]) -> Row:
    """How much faster a path is than what an unmeasured GPU does."""
    plain = key[0], "scratch"
    return {"scratch_ratio": ratio(times[plain], times[key])} if plain in times and key != plain else {}


def forced(kernels: tuple[str, ...], call: Callable, *arguments: Any) -> Callable[[], Any]:
    """``call`` with these GPU kernels and no other, whatever has been measured."""

    def run() -> Any:
        with dispatch.forced(*kernels):
            return call(*arguments)

    return run


def sampled(x: Tensor) -> Tensor:
    """Tokens that are compared with float64: all of a few, every so many of a long batch and the last one."""
    tokens = x.shape[0]
    if tokens <= SAMPLED_TOKENS:
        return torch.arange(tokens, device=x.device)
    return torch.linspace(0, tokens - 1, SAMPLED_TOKENS, device=x.device).long()


def graph_facts(column: Any) -> Row:
    """How many calls were timed together; why they were not one CUDA graph, if so."""
    found = {"calls": column.count}
    return found | ({"no_graph": column.capture_error} if column.capture_error else {})


@torch.no_grad()
def input_gradients(context: Context, fields: Row, weight: Tensor) -> None:
    """dX = dY W by the kernel of stored weights, for dispatch: rows of kind "dx"."""
    dense = [weight, *(weight.clone() for _ in range(copies_for(weight.nbytes, context.dry) - 1))]
    weights = {cell: Sparse(weight, cell, context.dry) for cell in context.cells}
    for tokens in DRY_DX_TOKENS if context.dry else DX_TOKENS:
        dy = torch.randn(tokens, weight.shape[0], device=weight.device).to(torch.bfloat16)
        calls: dict[Any, Calls] = {DENSE: [partial(torch.matmul, dy, copy) for copy in dense]}
        facts: dict[Any, Row] = {}
        for cell, path in ((cell, path) for cell in weights for path in ("scratch", "linear_t")):
            named = {**fields, **cell.fields, "kind": "dx", "tokens": tokens, "path": path}
            prepare = partial(input_gradient, weights[cell], dy, path, named, (cell, path), calls, facts)
            context.attempt(named, prepare)
        times, _ = take_turns(calls, dy.device, seconds=0.0 if context.dry else 0.1, min_turns=3)
        for key, row in facts.items():
            context.emit({**row, **figures(times, DENSE, key), **against_scratch(times, key)})


def input_gradient(
    sparse: Sparse, dy: Tensor, path: str, named: Row, key: Any, calls: dict[Any, Calls], facts: dict[Any, Row]
) -> None:
    """Add one way to ``calls`` and ``facts``, if its result is right."""
    kernels = () if path == "scratch" else (path,)
    made = [forced(kernels, ops.linear_t, dy, *copy, *sparse.shape) for copy in sparse.canonical_copies]
    wanted = product64(dy, sparse.dense.t())
    error, dense_rms = rms(made[0](), wanted), rms(dy @ sparse.dense, wanted)
    check_error(error, dense_rms, dy.dtype)
    calls[key], facts[key] = made, {**named, "rms": {"dense": dense_rms, "sparse": error}}


def training(context: Context, *, fields: Row) -> None:
    """Forward and backward of one layer whose input wants a gradient: three products; then with AdamW."""
    m, n, device = fields["m"], fields["n"], context.device
    weight = random_weight(m, n, torch.bfloat16, device)
    if context.dry or (fields["layer"] in CANONICAL_SHAPES and fields["model"] == "Llama-3-8B"):
        input_gradients(context, fields, weight)
    for tokens in tokens_of(context, "training"):
        x, dy = (torch.randn(tokens, size, device=device).to(torch.bfloat16) for size in (n, m))
        dense = DenseStep(weight, x, dy)
        for cell in context.cells:
            if str(cell) not in TRAINING_CELLS:
                continue
            if context.late():
                return context.emit({**fields, "kind": "skipped", "reason": "time"})
            sparse = Sparse(weight, cell, context.dry)
            for path, make in (("values", ValuesStep), ("spp", FactorsStep)):
                named = {**fields, **cell.fields, "tokens": tokens, "path": path}
                context.attempt(named, partial(one_step, context, dense, partial(make, sparse, x, dy)))
    return None


class Step:
    """Calls of one layer's training step; ``parameters`` are what AdamW updates."""

    parameters: list[Tensor]
    weight_bytes: int
    kernels: tuple[str, ...] = ()

    def forced(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """With the kernels that reduce dY^T X in its tiles; y and dX through the dense weight."""
        return forced(self.kernels, call)

    def gradients(self) -> tuple[Tensor, ...]:
        """(dx, gradient of every parameter)."""
        raise NotImplementedError

    def with_adamw(self) -> Callable[[], None]:
        """The step with a fused AdamW."""
        on_gpu = self.parameters[0].is_cuda
        optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=on_gpu, capturable=on_gpu)

        def step() -> None:
            _, *grads = self.gradients()
            for parameter, grad in zip(self.parameters, grads, strict=True):
                parameter.grad = grad.to(parameter.dtype)
            optimizer.step()

        return step

    def train_bytes(self) -> int:
        """Weight, gradient and the two moments of AdamW."""
        return self.weight_bytes + sum(3 * parameter.nbytes for parameter in self.parameters)


class DenseStep(Step):
    def __init__(self, weight: Tensor, x: Tensor, dy: Tensor):
        self.x, self.dy = x.detach().requires_grad_(), dy
        self.parameters = [weight.clone().requires_grad_()]
        self.weight_bytes = weight.nbytes

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(self.x, self.parameters[0]), (self.x, *self.parameters), self.dy)


class ValuesStep(Step):
    """The kept weights are trained."""

    kernels = ("values_grad",)

    def __init__(self, sparse: Sparse, x: Tensor, dy: Tensor):
        self.sparse, self.x, self.dy = sparse, x.detach().requires_grad_(), dy
        self.parameters = [sparse.values.clone().requires_grad_()]
        self.weight_bytes = sparse.nbytes

    def gradients(self) -> tuple[Tensor, ...]:
        y = ops.linear(self.x, self.parameters[0], self.sparse.metadata, None, *self.sparse.shape)
        return torch.autograd.grad(y, (self.x, *self.parameters), self.dy)

    def expected(self) -> list[Tensor]:
        mask = get_format(self.sparse.cell.pattern).unpack_mask(self.sparse.metadata, self.sparse.m, self.sparse.n)
        return [product64(self.dy.t(), self.x.detach().t())[mask].view(self.parameters[0].shape)]


class FactorsStep(Step):
    """SPP: the weights are frozen, a factor per row and one per column of each group of rows are trained."""

    kernels = ("factors_grad",)

    def __init__(self, sparse: Sparse, x: Tensor, dy: Tensor):
        self.sparse, self.x, self.dy = sparse, x, dy
        groups = SPP_GROUPS if sparse.m % SPP_GROUPS == 0 else 1
        a = torch.randn(groups, sparse.n, device=x.device) * 0.1
        b = torch.randn(sparse.m, device=x.device) * 0.1
        reason = self.forced(partial(factors.refusal, *sparse.shape, sparse.values, x, dy))()
        if reason:
            raise ValueError(f"no fused SPP here: {reason}")
        self.parameters = [a, b]
        self.weight_bytes = sparse.nbytes
        self.effective = torch.empty_like(sparse.values)

    def gradients(self) -> tuple[Tensor, ...]:
        sparse, (a, b) = self.sparse, self.parameters
        weight = sparse.values, sparse.metadata, *sparse.shape
        with torch.no_grad():
            factors.apply(self.effective, *weight, a, b, SPP_SCALE)
            ops.linear(self.x, self.effective, sparse.metadata, None, *sparse.shape)
            dx = ops.linear_t(self.dy, self.effective, sparse.metadata, *sparse.shape)
            return dx, *factors.gradients(self.dy, self.x, *weight, a, b, SPP_SCALE)

    def expected(self) -> list[Tensor]:
        (a, b), m = self.parameters, self.sparse.m
        product = product64(self.dy.t(), self.x.t()).mul_(self.sparse.dense).mul_(SPP_SCALE)
        rows = m // a.shape[0]
        da = (product * b.double()[:, None]).view(a.shape[0], rows, -1).sum(1)
        db = (product.view(a.shape[0], rows, -1) * a.double()[:, None]).sum(2).flatten()
        return [da, db]


def one_step(context: Context, dense: DenseStep, make: Callable[[], Any]) -> Row:
    """Check the gradients of the parameters against float64, then time; peak memory beside what the step is given."""
    sparse = make()
    expected = sparse.expected()
    weight64 = product64(dense.dy.t(), dense.x.detach().t())
    dense_rms = rms(dense.gradients()[1], weight64)
    del weight64
    errors = [rms(found, wanted) for found, wanted in zip(sparse.forced(sparse.gradients)()[1:], expected, strict=True)]
    check_error(max(errors), dense_rms, torch.bfloat16)
    del expected
    gradients, adamw = sparse.forced(sparse.gradients), sparse.forced(sparse.with_adamw())
    calls = {DENSE: [dense.gradients], "sparse": [gradients]}
    calls |= {("adamw", DENSE): [dense.with_adamw()], ("adamw", "sparse"): [adamw]}
    seconds = 0.0 if context.dry else 0.4
    times, columns = take_turns(calls, dense.x.device, seconds=seconds, min_turns=3 if context.dry else 7, max_turns=30)
    row = {"rms": {"dense": dense_rms, "sparse": max(errors)}, **figures(times, DENSE, "sparse")}
    row["with_adamw"] = figures(times, ("adamw", DENSE), ("adamw", "sparse"))
    row |= {"dense_bytes": dense.weight_bytes, "sparse_bytes": sparse.weight_bytes}
    row["training_bytes"] = {"dense": dense.train_bytes(), "sparse": sparse.train_bytes()}
    if dense.x.is_cuda:
        row["peak_bytes"] = {name: peak_bytes(step) for name, step in ((DENSE, dense.gradients), ("sparse", gradients))}
    return row | graph_facts(columns["sparse"])


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call allocates at most beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
