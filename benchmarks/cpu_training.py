"""One training step of an adapted linear layer on the CPU: SPP on compressed weights against LoRA on a dense one.

    cd benchmarks
    python cpu_training.py --output results/cpu_training.jsonl
    python cpu_training.py --shape 64x64 --tokens 8 --threads 1 --seconds-per-row 0       # does it run

A step is the forward and the backward pass of one layer whose input wants a gradient, as in the middle of a model.
Columns, which take turns (timing.py says how the times are reduced, and why):

    lora      nn.Linear, frozen, with a LoRA of rank 8 in the dtype of the weight   2 products of the size of the layer
    full      nn.Linear, its weight trained                                         3 products
    PATTERN   SPP (16 groups) on a compressed weight                                3 products

LoRA needs no gradient of the weight; SPP is defined by it. So with products at dense speed 0.67 of LoRA is the limit of
SPP, and 1.0 that of full training, where the zeros are not skipped. The parts of a sparse step are timed beside their
dense counterparts: ``forward`` (F.linear), ``dx`` (dy W), ``values_grad`` (dy^T x, whose dense counterpart gives a
result in the dtype of the inputs, the sparse one float32), ``spp_grad`` (the gradients of SPP's parameters) and
``spp_values`` (its effective values).

One JSON row per shape, tokens, threads and pattern: ``ms`` of every column, ``ratio`` of dense / sparse within a turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from timing import Samples, ratio, spread, take_turns
from torch import Tensor, nn
from training_cost_baselines import DenseLoRA

from sparse_rt.adapters.registry import get_adapter
from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.formats import get_format
from sparse_rt.kernels import factors, ops
from sparse_rt.kernels.native import library
from sparse_rt.nn import SparseLinear

SHAPES, TOKENS, THREADS = ("8192x2048", "2048x8192"), (256, 1024), (1, 2)
CELLS = ("2:4", "unstructured:0.5", "unstructured:0.75")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIN_TURNS, MAX_TURNS = 5, 200
# What is compared with what, dense / sparse.
PAIRS = {
    "lora / spp": ("lora", "spp"),
    "full / spp": ("full", "spp"),
    "forward": ("dense forward", "forward"),
    "dx": ("dense dx", "dx"),
    "values_grad": ("dense values_grad", "values_grad"),
    "spp_grad": ("dense values_grad", "spp_grad"),
}


class Full(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def spp_layer(weight: Tensor, cell: str) -> nn.Module:
    """An SPP adapter with its options' defaults on ``weight``, pruned at random."""
    pattern, _, sparsity = cell.rpartition(":") if cell.startswith("unstructured") else (cell, "", "0.5")
    fmt = get_format(pattern)
    mask = fmt.mask_from_scores(torch.rand(weight.shape), float(sparsity) if pattern == "unstructured" else None)
    adapter = get_adapter("spp")
    base = SparseLinear(weight.shape[1], weight.shape[0], pattern, *fmt.compress(weight, mask), None)
    layer = adapter.tuner_layer_cls(base, "default", adapter.config_cls())
    nn.init.normal_(layer.spp_B["default"])
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[int], None]:
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run(_turn: int) -> None:
        torch.autograd.grad(layer(x), [x, *trained], dy)

    return run


def columns(weight: Tensor, cell: str, tokens: int) -> dict[str, Callable[[int], Any]]:
    m, n = weight.shape
    layer = spp_layer(weight, cell)
    values, metadata, pattern = layer.base_layer.values.detach(), layer.base_layer.metadata, layer.base_layer.pattern
    where = metadata, pattern, m, n
    a, b = layer.spp_A["default"].detach(), layer.spp_B["default"].detach()
    x = torch.randn(tokens, n).to(weight.dtype).requires_grad_()
    dy = torch.randn(tokens, m).to(weight.dtype)
    still, wide, out = x.detach(), torch.empty(values.shape), torch.empty_like(values)
    found = {
        "lora": step(DenseLoRA(weight), x, dy),
        "full": step(Full(weight), x, dy),
        "spp": step(layer, x, dy),
        "dense forward": lambda _: F.linear(still, weight),
        "forward": lambda _: ops.linear(still, values, metadata, None, pattern, m, n),
        "dense dx": lambda _: dy @ weight,
        "dx": lambda _: ops.linear_t(dy, values, *where),
        "dense values_grad": lambda _: dy.T @ still,
        "values_grad": lambda _: ops.values_grad(dy, still, *where, wide),
    }
    if factors.refusal(pattern, m, n, values, still) is None:
        found["spp_grad"] = lambda _: factors.gradients(dy, still, values, *where, a, b, 2.0)
        found["spp_values"] = lambda _: factors.apply(out, values, *where, a, b, 2.0)
    return found


def row(samples: Samples) -> dict[str, Any]:
    """Times and ratios of one row, by the clock that timing.py chooses for its columns."""
    clock = samples.clock(*samples.wall)
    times = samples.cpu if clock == "cpu" else samples.wall
    return {
        "ms": {name: spread(seconds, 1e3) for name, seconds in times.items()},
        "ratio": {
            name: ratio(times[dense], times[sparse]) for name, (dense, sparse) in PAIRS.items() if sparse in times
        },
        **{"clock": clock, "turns": samples.turns},
        **{"busy_cores": samples.busy_cores, "stolen_cores": samples.stolen_cores},
    }


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="MxN of a layer")
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=TOKENS, show_default=True)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=THREADS, show_default=True)
@click.option("--cell", "cells", multiple=True, default=CELLS, show_default=True, help="N:M or unstructured:SPARSITY")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--seconds-per-row", type=click.FloatRange(0), default=20.0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSONL file to append rows to")
def main(shapes, tokens, threads, cells, dtype, seconds_per_row, output):
    """Time a training step of one adapted layer, compressed against dense."""
    torch.manual_seed(0)
    about = {"dtype": dtype, "isa": library.load().isa, "processor": cpu_name(), "torch": torch.__version__}
    about |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    for shape in shapes:
        m, n = map(int, shape.split("x"))
        weight = (torch.randn(m, n) * 0.02).to(DTYPES[dtype])
        for cell, size, count in ((c, s, t) for c in cells for s in tokens for t in threads):
            torch.set_num_threads(count)
            samples = take_turns(
                columns(weight, cell, size),
                seconds=seconds_per_row,
                min_turns=MIN_TURNS,
                max_turns=MAX_TURNS,
                one_thread=count == 1,
            )
            found = {"m": m, "n": n, "cell": cell, "tokens": size, "threads": count} | row(samples) | about
            medians = ", ".join(f"{name} {value['median']:.2f}" for name, value in found["ratio"].items())
            click.echo(f"{shape} {cell} tokens {size} threads {count}: {medians}")
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
