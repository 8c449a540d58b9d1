"""What a training step of one adapted layer costs on a GPU, against the same on a dense masked weight (gpu_suite.py).

Columns that take turns, for one shape and number of tokens; a step is the forward and the backward pass of one layer
whose input wants a gradient (no optimizer):

    official_spp, lora, masked_dense      training_cost_baselines.py, on the dense weight with the mask of 2:4
    spp, masklora, seft, values, dcft     the adapter layers, through their kernels; dcft is a trained scale of the
                                          layer's input: two products, no gradient of the weight
    the same (scratch)                    the same layers through torch and cuBLAS, as on an unmeasured GPU

One row per cell and path: ``ratios`` of every baseline's time to its own, ``scratch_ratio`` of the way without kernels
to the one with them (which decides the dispatch table), ``peak_bytes`` beyond weights and inputs. Every gradient was
compared before with float64: the adapter's equation differentiated at dY^T X.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_common import Cell, Context, Row, Task, Wrong, figures, product64, random_mask, random_weight, rms
from gpu_suite_speed import CANONICAL_SHAPES, forced, graph_facts, peak_bytes
from gpu_timing import take_turns
from timing import ratio, spread
from torch import Tensor, nn
from training_cost_baselines import DenseLoRA, MaskedDense, OfficialSPP, gradients

from sparse_rt.adapters.registry import get_adapter
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops, scratch
from sparse_rt.kernels.columns import scale_columns
from sparse_rt.nn import SparseLinear

TOKENS, LONG = (512, 2048), 8192  # LONG: for two shapes of the first model
CELLS = ("2:4", "50%", "75%")
BASELINES = {"official_spp": OfficialSPP, "lora": DenseLoRA, "masked_dense": MaskedDense}
# Adapter -> the kernel that reduces its gradient in the tiles of dY^T X.
KERNELS = {
    "spp": "factors_grad",
    "masklora": "rank_products",
    "seft": "positions_grad",
    "values": "values_grad",
    "dcft": "scale_columns",
}
# Of gradients that are sums of products in float32, from factors that bfloat16 does not hold: the kernels round some.
MAX_ERROR = 1e-2


def tasks(context: Context, models: tuple[str, ...]) -> list[Task]:
    found = []
    for model in models[:1] if context.dry else models:
        for layer, (m, n) in context.shapes.get(model, {}).items():
            fields = {"kind": "cost", "model": model, "layer": layer, "m": m, "n": n}
            tokens = (24,) if context.dry else TOKENS
            if not context.dry and model == models[0] and layer in CANONICAL_SHAPES:
                tokens = (*tokens, LONG)
            run = partial(measure, fields=fields, tokens_list=tokens)
            found.append(Task(f"cost {model} {layer} {m}x{n}", run))
    return found


class Adapted(nn.Module):
    """An adapter layer on a compressed weight, away from its initial values, in the form of the baselines."""

    def __init__(self, name: str, weight: Tensor, cell: Cell, mask: Tensor):
        super().__init__()
        adapter, (m, n) = get_adapter(name), weight.shape
        base = SparseLinear(n, m, cell.pattern, *get_format(cell.pattern).compress(weight, mask), None)
        self.layer = adapter.tuner_layer_cls(base, "default", adapter.config_cls())
        self.trainables = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in self.trainables:
                parameter.normal_(std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @property
    def weight_bytes(self) -> int:
        return self.layer.base_layer.weight_nbytes

    def expected(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Gradients of the trainables in float64: the adapter's update differentiated at dY^T X."""
        base = self.layer.base_layer
        weight = self.layer.compressed()
        (update,) = self.layer.updates(["default"])
        leaves = [p.detach().double().requires_grad_() if p.is_floating_point() else p for p in update.parameters]
        parts = [update.function(weight.rows(block, torch.float64), *leaves) for block in weight.blocks]
        changes = torch.cat([part.flatten() for part in parts])
        dense, wide = product64(dy.t(), x.detach().t()), base.values.double()
        gradient = ops.gather(dense, base.metadata, base.pattern, base.out_features, base.in_features, wide)
        trained = [leaf for leaf in leaves if leaf.is_floating_point()]
        return list(torch.autograd.grad(changes, trained, gradient.flatten()))


class InputScale(nn.Module):
    """DCFT at one layer: y = (x * s) W^T with a trained s [n], by the column kernels and two products."""

    def __init__(self, weight: Tensor, cell: Cell, mask: Tensor):
        super().__init__()
        m, n = weight.shape
        self.base = SparseLinear(n, m, cell.pattern, *get_format(cell.pattern).compress(weight, mask), None)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(n, device=weight.device))
        self.trainables = [self.scale]
        self.weight_bytes = self.base.weight_nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.base(scale_columns(x, self.scale))

    def expected(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        scaled = product64(dy, self.base.decompress().t())
        return [(x.detach().double() * scaled).sum(0)]


def measure(context: Context, *, fields: Row, tokens_list: tuple[int, ...]) -> None:
    m, n, device = fields["m"], fields["n"], context.device
    weight = random_weight(m, n, torch.bfloat16, device)
    cells = [cell for cell in context.cells if str(cell) in CELLS]
    masks = {cell: random_mask(cell, m, n, device) for cell in cells}
    for tokens in tokens_list:
        if context.late():
            context.emit({**fields, "tokens": tokens, "kind": "skipped", "reason": "time"})
            continue
        x, dy = (torch.randn(tokens, size, device=device).to(torch.bfloat16) for size in (n, m))
        one_number_of_tokens(context, {**fields, "tokens": tokens}, weight, masks, x.requires_grad_(), dy)


def one_number_of_tokens(
    context: Context, fields: Row, weight: Tensor, masks: dict[Cell, Tensor], x: Tensor, dy: Tensor
) -> None:
    masked = weight * next(iter(masks.values()))
    calls: dict[Any, Callable] = {}
    for name, make in BASELINES.items():
        if name != "official_spp" or weight.shape[0] % 16 == 0:
            calls[name] = partial(gradients, make(masked), x, dy)
    facts: dict[Any, Row] = {}
    for cell, mask in masks.items():
        for name, kernel in KERNELS.items():
            named = {**fields, **cell.fields, "path": name}

            def prepare(name=name, kernel=kernel, cell=cell, mask=mask, named=named):
                layer = InputScale(weight, cell, mask) if name == "dcft" else Adapted(name, weight, cell, mask)
                wanted = layer.expected(x, dy)
                ways = {
                    name: forced((kernel,), gradients, layer, x, dy),
                    f"{name} scratch": forced((), gradients, layer, x, dy),
                }
                errors = [check(way(), wanted) for way in ways.values()]
                calls.update({(cell, path): way for path, way in ways.items()})
                facts[cell, name] = {**named, "rms": {"sparse": max(errors)}, "sparse_bytes": layer.weight_bytes}

            context.attempt(named, prepare)
    if not facts:
        return
    seconds = 0.0 if context.dry else 0.6
    every = {key: [call] for key, call in calls.items()}
    times, columns = take_turns(every, x.device, seconds=seconds, min_turns=3 if context.dry else 7, max_turns=20)
    peaks = {key: peak_of(call) for key, call in calls.items()} if x.is_cuda else {}
    for (cell, name), row in facts.items():
        key, plain = (cell, name), (cell, f"{name} scratch")
        ratios = {base: ratio(times[base], times[key]) for base in BASELINES if base in times}
        found = {**figures(times, "masked_dense", key), "ratios": ratios, "dense_bytes": weight.nbytes}
        found["baseline_us"] = {base: spread(times[base], 1e6) for base in ratios}
        if plain in times:
            found |= {"scratch_ratio": ratio(times[plain], times[key]), "scratch_us": spread(times[plain], 1e6)}
        if peaks:
            found["peak_bytes"] = {base: peaks[base] for base in ratios} | {"sparse": peaks[key]}
            found["peak_bytes"] |= {"scratch": peaks[plain]} if plain in peaks else {}
        context.emit({**row, **found, **graph_facts(columns[key])})


def check(found: tuple[Tensor, ...], wanted: list[Tensor]) -> float:
    """The largest error of the trainables' gradients; dx is checked where products are (gpu_suite_speed.py)."""
    error = max(rms(have, want) for have, want in zip(found[1:], wanted, strict=True))
    if not error <= MAX_ERROR:
        raise Wrong(f"relative RMS error {error:.2e} of a gradient to float64, allowed {MAX_ERROR:.0e}")
    return error


def peak_of(call: Callable) -> int:
    """With scratch, which the first call of a step allocates anew."""
    scratch.release()
    return peak_bytes(call)
