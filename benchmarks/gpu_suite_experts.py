"""Mixtures of experts in gpu_suite.py: the grouped kernel against float64, and against two ways on dense weights.

Checks (group "experts-checks"): every kind of metadata, activation and dtype, experts of another rank, all tokens on
one expert, more weights than 32 bits count, CUDA graphs whose routing changes, and that nothing waits for the device.

Times (group "experts"), in turn in one run, dense weights with the same zeros:

    loop      one cuBLAS product after the other for every chosen expert. Which those are is known to it beforehand; a
              model would have to ask the device
    grouped   torch's grouped product over all experts of a layer (no row where this torch or GPU has none)
    sparse    the kernel on values and metadata

``ratio`` is that of the faster dense way. No dispatch follows from it, since nothing can take the kernel's place; what
was measured is said by ``sparse-rt env`` (gpu_suite_table.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_common import Cell, Context, Row, Task, Wrong, check_error, copies_for, poison, random_mask, rms
from gpu_suite_speed import graph_facts, sampled
from gpu_suite_whole import no_waiting
from gpu_timing import take_turns, warm_up
from timing import ratio, spread
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels import experts as moe

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Size:
    """A layer: ``k`` of ``experts`` experts a token."""

    experts: int
    k: int
    intermediate: int
    hidden: int

    @property
    def fields(self) -> Row:
        layer = f"{self.experts} experts, {self.k} a token"
        return {"layer": layer, "m": self.intermediate, "n": self.hidden}


MODELS = {
    "Qwen3-30B-A3B": Size(128, 8, 768, 2048),
    "Mixtral-8x7B": Size(8, 2, 14336, 4096),
    "OLMoE-1B-7B": Size(64, 8, 1024, 2048),
}
DRY_MODELS = {"Qwen3-30B-A3B": Size(4, 2, 24, 32)}
TOKENS, DRY_TOKENS = (1, 16, 128, 2048), (3,)
CELLS = (Cell("2:4", 0.5), Cell("unstructured", 0.5), Cell("unstructured", 0.75))
COMPARED_TOKENS = 32  # of a long batch, with float64

CHECKED = {
    "2:4": (Size(8, 2, 512, 1024), Size(5, 3, 36, 60), Size(200, 4, 64, 128)),
    "unstructured": (Size(8, 2, 512, 1024), Size(5, 3, 17, 130), Size(3, 1, 1, 3)),
    "4:8": (Size(5, 2, 40, 136),),
}
CHECKED_TOKENS = (1, 3, 17, 200)
DRY_CHECKED = {"2:4": (Size(3, 2, 12, 20),)}
# Its up alone has more weights, and half as many values, as 32 and 31 bits count.
LARGE = Size(136, 2, 4096, 4096)


class Layer:
    """Random experts pruned as ``cell`` says: dense [experts, rows, columns], and the tall compressed weights."""

    def __init__(self, size: Size, cell: Cell, device: torch.device, dtype: torch.dtype = BF16, activation="silu"):
        self.size, self.cell, self.dtype, self.device, self.activation = size, cell, dtype, device, activation
        rows = size.intermediate * (2 if moe.is_gated(activation) else 1)
        self.up, up = self._side(rows, size.hidden)
        self.down, down = self._side(size.hidden, size.intermediate)
        self.stored = [*up, *down]

    def _side(self, m: int, n: int) -> tuple[Tensor, list[Tensor]]:
        fmt, mask = get_format(self.cell.pattern), random_mask(self.cell, m, n, self.device)
        dense = torch.empty(self.size.experts, m, n, dtype=self.dtype, device=self.device)
        parts = []
        for expert in dense:  # the masks of all are one: times depend on how many weights are kept, not on which
            expert.copy_(torch.where(mask, torch.randn(m, n, device=self.device) / n**0.5, 0.0))
            parts.append(fmt.compress(expert, mask))
        return dense, [torch.cat(side) for side in zip(*parts, strict=True)]

    @property
    def how(self) -> tuple:
        pattern = self.cell.pattern
        return pattern, pattern, self.size.experts, self.size.intermediate, self.activation

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, and the weights and ids of a random router."""
        x = torch.randn(tokens, self.size.hidden, device=self.device).to(self.dtype)
        scores = torch.rand(tokens, self.size.experts, device=self.device)
        weights, ids = scores.topk(self.size.k)
        return x, weights / weights.sum(1, keepdim=True), ids.int()

    def sparse(self, x: Tensor, weights: Tensor, ids: Tensor, stored: list[Tensor] | None = None) -> Tensor:
        return moe.experts(x, weights, ids, *(stored or self.stored), *self.how)

    def wanted(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The equation in float64."""
        return moe.add_experts(
            *(x.double(), weights.double(), ids),
            *(partial(product64, self.up), partial(product64, self.down), self.activation),
        )


def product64(dense: Tensor, expert: int, x: Tensor) -> Tensor:
    return F.linear(x, dense[expert].double())


def loop(x: Tensor, chosen: dict[int, tuple[Tensor, Tensor]], up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One dense product after the other; ``chosen``: expert -> its tokens and their weights."""
    total = torch.zeros(x.shape, dtype=FP32, device=x.device)
    for expert, (tokens, scales) in chosen.items():
        h = moe.activate(F.linear(x[tokens], up[expert]), activation)
        total.index_add_(0, tokens, F.linear(h, down[expert]).float() * scales[:, None])
    return total.to(x.dtype)


def chosen(weights: Tensor, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """What ``loop`` knows beforehand."""
    found, scales = moe.grouped(ids), weights.flatten().float()
    return {expert: (which // ids.shape[-1], scales[which]) for expert, which in found.items()}


def grouped(x: Tensor, weights: Tensor, ids: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """torch's grouped product: tokens sorted by expert on the device, two products, back into their order."""
    tokens, k = ids.shape
    ordered, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(len(up), dtype=ids.dtype, device=x.device), right=True).int()
    h = moe.activate(torch._grouped_mm(x[order // k], up.transpose(1, 2), offs=ends), activation)
    out = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(out).index_copy_(0, order, out).view(tokens, k, -1)
    return (back.float() * weights[..., None]).sum(1).to(x.dtype)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_tasks(context: Context) -> list[Task]:
    """The tasks of the group "experts-checks"."""
    found = []
    for pattern, sizes in (DRY_CHECKED if context.dry else CHECKED).items():
        for size in sizes:
            run = partial(check_size, cell=Cell(pattern, 0.5), size=size)
            found.append(Task(f"experts {size} {pattern}", run))
    if context.dry:
        return found
    found.append(Task("experts: activations and dtypes", check_kinds))
    for cell in CELLS[:2]:
        found.append(Task(f"experts in a CUDA graph {cell}", partial(check_graph, cell=cell)))
        found.append(Task(f"experts with many weights {cell}", partial(check_large, cell=cell)))
    return found


def check_size(context: Context, *, cell: Cell, size: Size) -> None:
    layer = Layer(size, cell, context.device)
    for tokens in DRY_TOKENS if context.dry else CHECKED_TOKENS:
        x, weights, ids = layer.inputs(tokens)
        elsewhere, one = ids.masked_fill(ids == 0, -1), torch.full_like(ids, size.experts - 1)
        for name, given in (("", ids), (", some of another rank", elsewhere), (", all on one", one)):
            compare(context, layer, {"check": f"experts{name}"}, x, weights, given)


def check_kinds(context: Context) -> None:
    for cell in CELLS:
        for activation in moe.ACTIVATIONS:
            layer = Layer(Size(6, 2, 36, 132), cell, context.device, BF16, activation)
            compare(context, layer, {"check": f"experts {activation}"}, *layer.inputs(33))
        for dtype in (FP16, FP32):
            layer = Layer(Size(6, 2, 36, 132), cell, context.device, dtype)
            compare(context, layer, {"check": "experts"}, *layer.inputs(33))


def compare(context: Context, layer: Layer, fields: Row, x: Tensor, weights: Tensor, ids: Tensor) -> None:
    """A check row: the kernel, twice, against float64; not much worse than the dense loop, and the same both times."""
    fields = {"kind": "check", **layer.cell.fields, **layer.size.fields, "tokens": x.shape[0], **fields}

    def part() -> Row:
        wanted = layer.wanted(x, weights, ids)
        dense = rms(loop(x, chosen(weights, ids), layer.up, layer.down, layer.activation), wanted)
        poison(x.device, *(ids.numel() * size * x.element_size() for size in wanted.shape[1:]))
        found = layer.sparse(x, weights, ids)
        error = rms(found, wanted)
        check_error(error, dense, layer.dtype)
        if not torch.equal(found, layer.sparse(x, weights, ids)):
            raise Wrong("a second run gives another result")
        return {"rms": {"dense": dense, "sparse": error}}

    context.attempt({**fields, "dtype": str(layer.dtype).removeprefix("torch.")}, part)


def check_graph(context: Context, *, cell: Cell) -> None:
    """A captured layer follows x and the router, and nothing in it waits for the device."""
    layer = Layer(Size(16, 4, 256, 512), cell, context.device)

    def part(tokens: int) -> Row:
        given = layer.inputs(tokens)
        call, worst = partial(layer.sparse, *given), 0.0
        warm_up([call])
        with no_waiting():
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for _ in range(3):
            for old, new in zip(given, layer.inputs(tokens), strict=True):
                old.copy_(new)
            y.fill_(float("nan"))
            graph.replay()
            wanted = layer.wanted(*given)
            error, dense = rms(y, wanted), loop(given[0], chosen(*given[1:]), layer.up, layer.down, layer.activation)
            check_error(error, rms(dense, wanted), BF16)
            worst = max(worst, error)
        return {"rms": {"sparse": worst}}

    for tokens in (1, 40, 300):
        fields = {"kind": "check", **cell.fields, "check": "experts in a CUDA graph", "tokens": tokens}
        context.attempt(fields, partial(part, tokens))


def check_large(context: Context, *, cell: Cell) -> None:
    """The first and the last of many experts; those between them are never chosen."""
    small = Layer(dataclasses.replace(LARGE, experts=2), cell, context.device)
    x, weights, ids = small.inputs(20)

    def tall(part: Tensor) -> Tensor:
        first, last = part.chunk(2)
        return torch.cat([first.repeat(LARGE.experts - 1, *[1] * (part.ndim - 1)), last])

    def part() -> Row:
        wanted = small.wanted(x, weights, ids)
        dense = rms(loop(x, chosen(weights, ids), small.up, small.down, small.activation), wanted)
        how = *small.how[:2], LARGE.experts, *small.how[3:]
        y = moe.experts(x, weights, ids * (LARGE.experts - 1), *map(tall, small.stored), *how)
        check_error(rms(y, wanted), dense, BF16)
        return {"rms": {"dense": dense, "sparse": rms(y, wanted)}}

    context.attempt({"kind": "check", **cell.fields, **LARGE.fields, "check": "experts, many weights"}, part)


# ---- times ----------------------------------------------------------------------------------------------------------


def tasks(context: Context) -> list[Task]:
    """The tasks of the group "experts"."""
    found = []
    for model, size in (DRY_MODELS if context.dry else MODELS).items():
        for cell in CELLS[::2] if context.dry else CELLS:
            fields = {"kind": "experts", "model": model, **size.fields, **cell.fields}
            found.append(Task(f"experts {model} {cell}", partial(measure, size=size, cell=cell, fields=fields)))
    return found


@torch.no_grad()
def measure(context: Context, *, size: Size, cell: Cell, fields: Row) -> None:
    layer = Layer(size, cell, context.device)
    dense = copies([layer.up, layer.down], context.dry)
    stored = copies(layer.stored, context.dry)
    for tokens in DRY_TOKENS if context.dry else TOKENS:
        if context.late():
            context.emit({**fields, "tokens": tokens, "kind": "skipped", "reason": "time"})
            continue
        named = {**fields, "tokens": tokens, "path": "experts"}
        context.attempt(named, partial(one_number_of_tokens, context, layer, tokens, dense, stored))


def copies(tensors: list[Tensor], dry: bool) -> list[list[Tensor]]:
    """As many copies as no cache holds together."""
    count = copies_for(sum(tensor.nbytes for tensor in tensors), dry)
    return [tensors, *([tensor.clone() for tensor in tensors] for _ in range(count - 1))]


def one_number_of_tokens(
    context: Context, layer: Layer, tokens: int, dense: list[list[Tensor]], stored: list[list[Tensor]]
) -> Row:
    """Check the three ways on one batch, then time them."""
    x, weights, ids = layer.inputs(tokens)
    known = chosen(weights, ids)
    calls: dict[str, list[Callable]] = {
        "loop": [partial(loop, x, known, *pair, layer.activation) for pair in dense],
        "grouped": [partial(grouped, x, weights, ids, *pair, layer.activation) for pair in dense],
        "sparse": [partial(layer.sparse, x, weights, ids, copy) for copy in stored],
    }
    sample = sampled(x)[:: max(1, tokens // COMPARED_TOKENS)]
    wanted = layer.wanted(x[sample], weights[sample], ids[sample])
    found: Row = {"rms": {"dense": rms(calls["loop"][0]()[sample], wanted)}}
    try:
        product = calls["grouped"][0]()
    except (RuntimeError, AttributeError) as error:  # torch lacks it or has it for other GPUs: the row says so
        found["no_grouped"] = " ".join(str(error).split())[:200]
        del calls["grouped"]
    else:  # a wrong baseline fails the row
        check_error(rms(product[sample], wanted), found["rms"]["dense"], BF16)
    poison(x.device, ids.numel() * layer.size.intermediate * 2, ids.numel() * layer.size.hidden * 2)
    found["rms"]["sparse"] = rms(calls["sparse"][0]()[sample], wanted)
    check_error(found["rms"]["sparse"], found["rms"]["dense"], BF16)
    for call in calls["sparse"][1:]:  # makes the index of every copy, which no graph can keep
        call()
    times, columns = take_turns(
        calls, x.device, seconds=0.0 if context.dry else 0.15, min_turns=3 if context.dry else 7
    )
    return found | compared(times) | graph_facts(columns["sparse"]) | sizes(dense[0], stored[0], known)


def compared(times: dict[str, list[float]]) -> Row:
    """Times and ratios, to the faster of the dense ways."""
    us = {name: spread(values, 1e6) for name, values in times.items()}
    ratios = {name: ratio(times[name], times["sparse"]) for name in times if name != "sparse"}
    fastest = min(ratios, key=lambda name: us[name]["median"])
    us = {"dense": us[fastest], "sparse": us["sparse"]}
    baseline_us = {name: spread(times[name], 1e6) for name in ratios}
    return {"us": us, "baseline_us": baseline_us, "ratios": ratios, "ratio": ratios[fastest], "fastest": fastest}


def sizes(dense: list[Tensor], stored: list[Tensor], known: dict) -> Row:
    held = {"dense_bytes": dense, "sparse_bytes": stored}
    return {"chosen_experts": len(known)} | {name: sum(one.nbytes for one in part) for name, part in held.items()}
