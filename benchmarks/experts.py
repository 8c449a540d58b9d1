"""Mixtures of experts on packed weights against dense experts, one call of a layer in bf16.

    cd benchmarks
    python experts.py --output results/experts.jsonl
    python experts.py --model qwen3 --tokens 1 --threads 2 --seconds 0.2            # a look

For each model, number of tokens and threads these take turns (timing.py), each turn with another random routing:

    experts      packed_experts, for every way to prune
    one_by_one   the same weights through ``packed_linear`` from Python, an expert after the other
    vllm         cpu_fused_moe of vLLM on dense weights in its own layout, where vLLM is installed
    torch        otherwise F.linear on the dense weights, an expert after the other

All experts of a layer have the same random values (what is measured does not depend on them) and each has memory of its
own: what a call reads was pushed out of the third-level cache by the columns before it. Before anything is timed the
results of all columns are compared with float64; a relative RMS error above 1e-2 (three roundings to bf16) is an error.

One JSON row per way to prune. In ``ms`` and ``ratio_*``: p10, median and p90 over the turns; ``ratio_*`` is the other
column / ``experts`` within a turn, so above 1 ``experts`` is faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from timing import Samples, ratio, spread, take_turns
from torch import Tensor

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.formats import get_format
from sparse_rt.kernels import experts as moe
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.experts import join

CELLS = {"unstructured 0.5": ("unstructured", 0.5), "unstructured 0.75": ("unstructured", 0.75), "2:4": ("2:4", 0.5)}
MAX_RMS = 1e-2
ROUTINGS, MIN_TURNS, MAX_TURNS = 64, 7, 300
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Layer:
    experts: int
    k: int
    hidden: int
    intermediate: int


MODELS = {"qwen3": Layer(128, 8, 2048, 768), "mixtral": Layer(8, 2, 4096, 14336)}
TINY = Layer(4, 2, 64, 96)

# x, weights, ids -> y
Column = Callable[[Tensor, Tensor, Tensor], Tensor]


def routings(layer: Layer, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and ids [tokens, k] of many calls."""
    generator = torch.Generator().manual_seed(tokens)
    found = []
    for _ in range(ROUTINGS):
        scores = torch.rand(tokens, layer.experts, generator=generator)
        weights, ids = scores.topk(layer.k)
        found.append((weights.softmax(-1), ids.int()))
    return found


def pruned(weight: Tensor, cell: str) -> Tensor:
    """The mask of what is kept."""
    pattern, sparsity = CELLS[cell]
    scores = torch.rand(weight.shape)
    return scores >= sparsity if pattern == "unstructured" else get_format(pattern).mask_from_scores(scores)


def packed_columns(layer: Layer, up: Tensor, down: Tensor, cell: str) -> tuple[Column, Column, int, str]:
    """``experts`` and ``one_by_one`` on weights that were pruned, their bytes and the layout."""
    pattern, stacks = CELLS[cell][0], []
    for weight in (up, down):
        blob = packed.pack(*get_format(pattern).compress(weight, weight != 0), pattern, *weight.shape)
        stacks.append(join([blob] * layer.experts))
    (ups, up_spans), (downs, down_spans) = stacks
    up_at, down_at = up_spans.tolist(), down_spans.tolist()

    def together(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe.packed_experts(x, weights, ids, ups, up_spans, downs, down_spans, layer.intermediate, "silu")

    def project(expert: int, x: Tensor) -> Tensor:
        return packed.packed_linear(x, ups[slice(*up_at[expert])], None, *up.shape)

    def project_back(expert: int, h: Tensor) -> Tensor:
        return packed.packed_linear(h, downs[slice(*down_at[expert])], None, *down.shape)

    def one_by_one(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe.add_experts(x, weights, ids, project, project_back, "silu")

    return together, one_by_one, ups.nbytes + downs.nbytes, packed.describe(blob)["layout"]


def dense_column(layer: Layer, up: Tensor, down: Tensor) -> tuple[str, Column]:
    """The dense layer of vLLM, or of torch where there is no vLLM with a kernel for the CPU."""
    ups, downs = (weight.repeat(layer.experts, 1, 1) for weight in (up, down))
    try:
        from vllm import _custom_ops as vllm

        isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        ups = vllm.cpu_prepack_moe_weight(ups, isa)
        downs = vllm.cpu_prepack_moe_weight(downs, isa)
    except (ImportError, AttributeError, RuntimeError) as error:
        click.echo(f"the dense column is torch's: vLLM's kernel is not there ({error})", err=True)

        def one_by_one(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            project, project_back = (lambda e, x, w=w: F.linear(x, w[e]) for w in (ups, downs))
            return moe.add_experts(x, weights, ids, project, project_back, "silu")

        return "torch", one_by_one

    def fused(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        vllm.cpu_fused_moe(out, x, ups, downs, None, None, weights, ids, "silu", isa)
        return out

    return "vllm", fused


def check(name: str, column: Column, x: Tensor, routing: tuple[Tensor, Tensor], up: Tensor, down: Tensor) -> float:
    """Relative RMS error against float64; all experts are equal, so y is sum(w) times the result of one."""
    weights = routing[0].double().sum(1, keepdim=True)
    wanted = weights * (moe.activate(x.double() @ up.double().t(), "silu") @ down.double().t())
    rms = float((column(x, *routing).double() - wanted).norm() / wanted.norm())
    if not rms <= MAX_RMS:  # NaN as well
        raise click.ClickException(f"{name}: the relative RMS error is {rms:.2e}, allowed is {MAX_RMS:g}; not timed")
    return rms


@dataclass
class Columns:
    """Everything that is timed for one model."""

    layer: Layer
    dense: str
    run: dict[str, Column]
    facts: dict[str, dict]

    def measure(self, x: Tensor, threads: int, seconds: float) -> Samples:
        torch.set_num_threads(threads)
        found = routings(self.layer, len(x))
        return take_turns(
            {name: partial(self._turn, column, x, found) for name, column in self.run.items()},
            seconds=seconds * len(self.run),
            min_turns=MIN_TURNS,
            max_turns=MAX_TURNS,
            one_thread=threads == 1,
        )

    @staticmethod
    def _turn(column: Column, x: Tensor, found: list, turn: int) -> Tensor:
        return column(x, *found[turn % len(found)])


def columns(layer: Layer, cells: list[str]) -> Columns:
    """Make the weights and check every column."""
    up = torch.randn(2 * layer.intermediate, layer.hidden).mul_(layer.hidden**-0.5).bfloat16()
    down = torch.randn(layer.hidden, layer.intermediate).mul_(layer.intermediate**-0.5).bfloat16()
    for weight in (up, down):
        weight[weight == 0] = 0.02  # a kept weight of zero would be no weight
    x, routing = torch.randn(CHECKED_TOKENS, layer.hidden).bfloat16(), routings(layer, CHECKED_TOKENS)[0]
    dense, column = dense_column(layer, up, down)
    found = Columns(layer, dense, {dense: column}, {})
    check(dense, column, x, routing, up, down)
    dense_bytes = layer.experts * (up.nbytes + down.nbytes)
    for cell in cells:
        kept = [torch.where(pruned(weight, cell), weight, 0) for weight in (up, down)]
        together, one_by_one, nbytes, layout = packed_columns(layer, *kept, cell)
        for name, column in (("experts", together), ("one_by_one", one_by_one)):
            found.run[f"{name} {cell}"] = column
            rms = check(f"{name} {cell}", column, x, routing, *kept)
        pattern, sparsity = CELLS[cell]
        sizes = {"dense": dense_bytes, "packed": nbytes}
        found.facts[cell] = dict(
            pattern=pattern, sparsity=sparsity, layout=layout, bytes=sizes, rms=float(f"{rms:.3g}")
        )
    return found


def rows_of(found: Columns, samples: Samples) -> Iterator[dict]:
    """A row for each way to prune."""
    for cell, facts in found.facts.items():
        names = {"experts": f"experts {cell}", "one_by_one": f"one_by_one {cell}", found.dense: found.dense}
        clock = samples.clock(*names.values())
        times = samples.cpu if clock == "cpu" else samples.wall
        row = facts | {"ms": {kind: spread(samples.wall[name], 1e3) for kind, name in names.items()}, "clock": clock}
        for kind in ("one_by_one", found.dense):
            row[f"ratio_{kind}"] = ratio(times[names[kind]], times[names["experts"]])
        noise = {"preempted": samples.preempted(*names.values()), "busy_cores": samples.busy_cores}
        yield row | {name: value and round(value, 3) for name, value in noise.items()} | {"turns": samples.turns}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice([*MODELS, "tiny"]), default=tuple(MODELS),
              show_default=True)  # fmt: skip
@click.option("--experts", type=click.IntRange(1), help="so many instead of the model's, where memory is short")
@click.option("--cell", "cells", multiple=True, type=click.Choice(list(CELLS)), default=tuple(CELLS), show_default=True)
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=(1, 4, 16, 128), show_default=True)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="for one column of one run")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines; rows are appended")
@torch.inference_mode()
def main(models, experts, cells, tokens, threads, seconds, output):
    """Time a layer of experts."""
    torch.manual_seed(0)
    where = {"isa": library.load().isa, "processor": cpu_name(), "torch": torch.__version__}
    where |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    for model in models:
        layer = MODELS.get(model, TINY)
        layer = Layer(experts or layer.experts, min(layer.k, experts or layer.k), layer.hidden, layer.intermediate)
        torch.set_num_threads(max(threads))
        found = columns(layer, list(cells))
        about = {"model": model, **vars(layer)}
        for count in threads:
            for size in tokens:
                samples = found.measure(torch.randn(size, layer.hidden).bfloat16(), count, seconds)
                for row in rows_of(found, samples):
                    line = json.dumps(about | {"tokens": size, "threads": count} | row | where)
                    click.echo(line)
                    if output is not None:
                        with output.open("a") as file:
                            file.write(line + "\n")


if __name__ == "__main__":
    main()
