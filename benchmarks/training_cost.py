"""Step time and peak memory of training one compressed layer, against what people do with dense masked weights.

    cd benchmarks
    python training_cost.py --output results/training_cost.jsonl                     # about 20 minutes on two cores
    python training_cost.py --shape 64x64 --tokens 8 --seconds-per-row 0 --blocks 1  # does it run

Dense columns (training_cost_baselines.py gives equations and units):

    official   the SPP authors' layer            6 products of the size of the layer, 102 bytes a weight elementwise
    lora       LoRA of rank 8 on masked weights  2 products
    masked     the weight itself, masked         3 products

Sparse columns are the product's adapters with their defaults on the same weights, compressed: ``spp``, ``spp-exact``
(base and update apart, as dropout needs it), ``masklora``, ``values``, ``dcft`` (2 products), ``seft``. A step is the
forward and the backward pass of one layer whose input wants a gradient, bf16, the adapters' parameters in float32.

Two kinds of rows. ``time``: all columns take turns in one process (timing.py). ``memory``: the linears of ``--blocks``
decoder blocks of Llama-3.2-1B, each column in a process of its own: what it grew by at its peak from before the weights
were made to after a step through every layer with the gradients kept; weights, gradients and temporaries, no optimizer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from timing import ratio, spread, take_turns
from torch import Tensor, nn
from training_cost_baselines import DenseLoRA, MaskedDense, OfficialSPP, gradients

from sparse_rt.adapters.registry import get_adapter
from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.formats import get_format
from sparse_rt.nn import SparseLinear

SHAPES, TOKENS, CELLS = ("2048x2048", "8192x2048", "2048x8192"), (512, 2048), ("2:4", "unstructured:0.5")
# The linears of a decoder block of Llama-3.2-1B: q, k, v, o, gate, up, down.
BLOCK = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
DENSE = {"official": OfficialSPP, "lora": DenseLoRA, "masked": MaskedDense}
# Column -> adapter and what differs from its defaults.
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "spp": ("spp", {}),
    "spp-exact": ("spp", {"exact": True}),
    "masklora": ("masklora", {}),
    "seft": ("seft", {}),
    "dcft": ("dcft", {"units": ["qk"]}),
    "values": ("values", {}),
}
# Times of one turn are compared: dense / sparse.
PAIRS = [(dense, sparse) for dense in DENSE for sparse in SPARSE]
MIN_TURNS, MAX_TURNS = 5, 40


def random_weight(m: int, n: int, cell: str) -> tuple[Tensor, Tensor, str]:
    """(bf16 weight [m, n] with zeros, its mask, pattern)."""
    pattern, _, sparsity = cell.rpartition(":") if cell.startswith("unstructured") else (cell, "", "0.5")
    mask = get_format(pattern).mask_from_scores(torch.rand(m, n), float(sparsity))
    return (torch.randn(m, n) * 0.02).bfloat16() * mask, mask, pattern


def tensors_of(column: str, m: int, n: int, cell: str) -> tuple[str, tuple[Tensor, ...]]:
    """(pattern, what the layer of ``column`` is made from): the dense masked weight, or values and metadata."""
    weight, mask, pattern = random_weight(m, n, cell)
    return pattern, (weight,) if column in DENSE else get_format(pattern).compress(weight, mask)


def make(column: str, m: int, n: int, pattern: str, tensors: tuple[Tensor, ...]) -> nn.Module:
    """The layer of ``column``; its adapter has parameters that do something."""
    if column in DENSE:
        return DENSE[column](*tensors)
    name, options = SPARSE[column]
    base = SparseLinear(n, m, pattern, *tensors, None)
    adapter = get_adapter(name)
    layer = adapter(nn.ModuleDict({"q_proj": base}), adapter.config_cls(**options), "default").model["q_proj"]
    layer.trainables = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in layer.trainables:
            parameter.normal_(std=0.01)
    return layer


def time_row(m: int, n: int, cell: str, tokens: int, seconds: float) -> dict[str, Any]:
    weight, mask, pattern = random_weight(m, n, cell)
    x = torch.randn(tokens, n).bfloat16().requires_grad_()
    dy = torch.randn(tokens, m).bfloat16()

    def step(layer: nn.Module):
        return lambda _turn: gradients(layer, x, dy)

    compressed = get_format(pattern).compress(weight, mask)
    columns = {
        name: step(make(name, m, n, pattern, (weight,) if name in DENSE else compressed)) for name in (*DENSE, *SPARSE)
    }
    threads = torch.get_num_threads()
    samples = take_turns(columns, seconds=seconds, min_turns=MIN_TURNS, max_turns=MAX_TURNS, one_thread=threads == 1)
    clock = samples.clock(*samples.wall)
    times = samples.cpu if clock == "cpu" else samples.wall
    return {
        "kind": "time",
        "m": m,
        "n": n,
        "tokens": tokens,
        "ms": {name: spread(found, 1e3) for name, found in times.items()},
        "ratio": {f"{dense} / {sparse}": ratio(times[dense], times[sparse]) for dense, sparse in PAIRS},
        **{"clock": clock, "turns": samples.turns, "threads": threads},
        **{"busy_cores": samples.busy_cores, "stolen_cores": samples.stolen_cores},
    }


def memory(field: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (peak since /proc/self/clear_refs)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def grown(column: str, cell: str, tokens: int, blocks: int, shapes) -> dict[str, int]:
    """Bytes that weights and a step of every layer added to this process at the peak, and after everything."""

    def step(layer: nn.Module) -> None:
        m, n = layer.weight_shape
        x = torch.randn(tokens, n).bfloat16().requires_grad_()
        gradients(layer, x, torch.randn(tokens, m).bfloat16())

    def build(m: int, n: int) -> nn.Module:
        pattern, tensors = made[m, n]
        layer = make(column, m, n, pattern, tuple(tensor.clone() for tensor in tensors))
        layer.weight_shape = (m, n)
        return layer

    made = {shape: tensors_of(column, *shape, cell) for shape in {*shapes, (64, 64)}}
    step(build(64, 64))  # libraries are loaded and kernels compiled before the first reading
    before = memory("VmRSS")
    layers = [build(m, n) for _ in range(blocks) for m, n in shapes]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    built = memory("VmRSS")
    for layer in layers:
        step(layer)
    return {
        "peak": memory("VmHWM") - before,
        "built": built - before,
        "weights": blocks * sum(m * n for m, n in shapes),
    }


def memory_row(cell: str, tokens: int, blocks: int, columns=(*DENSE, *SPARSE), shapes=BLOCK) -> dict[str, Any]:
    # Freed memory goes back to the system at once, or it would hide what comes after it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for column in columns:
        command = [sys.executable, __file__, "--child", column, "--cell", cell, "--tokens", tokens, "--blocks", blocks]
        command += [part for m, n in shapes for part in ("--shape", f"{m}x{n}")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)
        found[column] = json.loads(done.stdout.splitlines()[-1])
    weights = found[columns[0]]["weights"]
    return {
        "kind": "memory",
        "tokens": tokens,
        "blocks": blocks,
        "weights": weights,
        "mb": {
            name: {part: round(value[part] / 1e6, 1) for part in ("peak", "built")} for name, value in found.items()
        },
        "ratio": {
            f"{sparse} / {dense}": round(found[sparse]["peak"] / found[dense]["peak"], 3)
            for dense, sparse in PAIRS
            if {dense, sparse} <= found.keys()
        },
        "threads": torch.get_num_threads(),
    }


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="MxN of a timed layer")
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=TOKENS, show_default=True)
@click.option("--cell", "cells", multiple=True, default=CELLS, show_default=True, help="N:M or unstructured:SPARSITY")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--blocks", type=click.IntRange(0), default=16, show_default=True, help="of the memory rows; 0: none")
@click.option("--seconds-per-row", type=click.FloatRange(0), default=40.0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSONL file to append rows to")
@click.option("--child", hidden=True, help="print the memory of one column")
def main(shapes, tokens, cells, threads, blocks, seconds_per_row, output, child):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if child:
        sizes = [tuple(map(int, shape.split("x"))) for shape in shapes]
        click.echo(json.dumps(grown(child, cells[0], tokens[0], blocks, sizes)))
        return
    about = {"processor": cpu_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    for cell in cells:
        for found in rows_of(cell, shapes, tokens, blocks, seconds_per_row):
            found = {"cell": cell, **found, **about}
            click.echo(summary(found))
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(found) + "\n")


def rows_of(cell: str, shapes, tokens, blocks: int, seconds: float) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        for count in tokens:
            yield time_row(*map(int, shape.split("x")), cell, count, seconds)
    for count in tokens if blocks else ():
        yield memory_row(cell, count, blocks)


def summary(row: dict[str, Any]) -> str:
    where = f"{row['m']}x{row['n']}" if row["kind"] == "time" else f"memory of {row['blocks']} blocks"
    values = {name: value["median"] if row["kind"] == "time" else value for name, value in row["ratio"].items()}
    return f"{where} {row['cell']} {row['tokens']} tokens: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items())


if __name__ == "__main__":
    main()
