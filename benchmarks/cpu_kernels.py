"""Sparse against dense linear layers on the CPU: shapes of real models, sparsities, tokens, threads, in one run.

    cd benchmarks
    python cpu_kernels.py --output results/cpu_kernels.jsonl                        # everything
    python cpu_kernels.py --group bars --tokens 1 --tokens 4 --threads 1            # a part of it
    python cpu_kernels_report.py results/cpu_kernels.jsonl --plot results/cpu_kernels.png

For each shape, number of tokens and threads, torch's ``F.linear`` on the dense weight, our own dense product
(dense_baseline.c, bf16 only) and every sparse cell take turns (timing.py says how the times are reduced, and why).
Two baselines, because torch leaves much of the memory bandwidth unused at few tokens: the ratio to torch is what a user
gains, the ratio to our own dense product is what sparsity gains.

Every weight exists in as many copies as make 128 MiB (at least two), and each turn takes the next one, so that no
weight is in the third-level cache when its turn comes, as in a model. The activations are small and stay there, as in a
model. Sparse weights are packed anew for each copy, so that a copy lies in memory as the product would find it.
Masks are random and the weights N(0, 0.02): what is measured does not depend on their values.

Before a column is timed, its result is compared with the float64 product of the same rounded weights; a relative RMS
error above 5e-3 makes an error row without times, and the exit status is 1.

One JSON row per sparse cell, written as soon as it is measured. In ``ms`` and ``ratio_*``: p10, median and p90 over the
turns; ``ratio_*`` is dense / sparse within a turn, ``limit`` dense bytes / sparse bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import cpu_kernels_report as report
import dense_baseline
import torch
import torch.nn.functional as F
from timing import Samples, ratio, spread, take_turns
from torch import Tensor

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library

GROUPS = {
    "bars": {"11008x4096": "Llama-2-7B gate/up", "4096x14336": "Llama-3-8B down"},
    "llama-1b": {"2048x2048": "q/o", "512x2048": "k/v", "8192x2048": "gate/up", "2048x8192": "down"},
    "llama-8b": {"4096x4096": "q/o", "1024x4096": "k/v", "14336x4096": "gate/up", "4096x14336": "down"},
    "qwen3-4b": {"4096x2560": "q", "1024x2560": "k/v", "2560x4096": "o", "9728x2560": "gate/up", "2560x9728": "down"},
}
SPARSITIES, TOKENS, THREADS = (0.5, 0.6, 0.7, 0.75, 0.9), (1, 4, 16, 64, 512), (1, 2)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ROTATED_BYTES = 128 << 20  # four times the third-level cache of the machine this was written on
MAX_COPIES = 512  # weights below 256 KiB stay in the cache, as those of a tiny model do
MEMORY_BYTES = 6 << 30
MAX_RMS = 5e-3
MIN_TURNS, MAX_TURNS = 7, 300
REFERENCE_ROWS = 1024
TORCH, DENSE = "torch", "dense"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to prune the weight."""

    pattern: str
    sparsity: float

    def __str__(self) -> str:
        return f"{self.pattern} {self.sparsity:g}"


@dataclasses.dataclass
class Column:
    """One way to compute y = x W^T: the copies of its weight, and what the correct result is."""

    copies: list[Any]
    nbytes: int
    run: Callable[[Tensor, Any], Tensor]
    reference: Tensor
    canonical_bytes: int = 0
    layout: str = ""

    def __call__(self, x: Tensor, turn: int) -> Tensor:
        return self.run(x, self.copies[turn % len(self.copies)])

    def rms(self, x: Tensor) -> float:
        """Relative RMS error of the product with the first copy."""
        reference = self.reference[: x.shape[0]]
        return float((self(x, 0).double() - reference).norm() / reference.norm())


def copies_for(nbytes: int) -> int:
    """Copies of a weight that no cache holds together."""
    return min(MAX_COPIES, max(2, math.ceil(ROTATED_BYTES / max(1, nbytes))))


def product64(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """x W^T in float64, a block of rows at a time."""
    x = x.double()
    blocks = []
    for start in range(0, weight.shape[0], REFERENCE_ROWS):
        block = weight[start : start + REFERENCE_ROWS].double()
        if mask is not None:
            block *= mask[start : start + REFERENCE_ROWS]
        blocks.append(x @ block.t())
    return torch.cat(blocks, dim=1)


def columns(m: int, n: int, x: Tensor, cells: list[Cell]) -> dict[str | Cell, Column]:
    """Every column of one shape in the dtype of x; ``UserError`` where their copies would take too much memory."""
    generator = torch.Generator().manual_seed(m * 31 + n)
    weight = (torch.randn(m, n, generator=generator) * 0.02).to(x.dtype)
    weight[weight == 0] = 0.02  # a kept weight of zero would be no weight
    dense = weight.nbytes
    needed = 2 * copies_for(dense) * dense
    needed += sum(copies_for(size) * size for size in (round(dense * (1.125 - cell.sparsity)) for cell in cells))
    if needed > MEMORY_BYTES:
        raise UserError(
            f"the copies of a ({m}, {n}) weight take {needed / 2**30:.1f} GiB, the limit is {MEMORY_BYTES >> 30}; "
            f"choose fewer --sparsity"
        )
    reference = product64(x, weight)
    found: dict[str | Cell, Column] = {
        TORCH: Column([weight.clone() for _ in range(copies_for(dense))], dense, F.linear, reference)
    }
    if x.dtype == torch.bfloat16 and dense_baseline.unavailable_reason() is None:
        copies = [dense_baseline.pack(weight) for _ in range(copies_for(dense))]
        found[DENSE] = Column(copies, copies[0].nbytes, partial(own_dense, m=m, n=n), reference)
    scores = torch.rand(m, n, generator=generator)
    for cell in cells:
        found[cell] = sparse_column(weight, scores, cell, x)
    return found


def own_dense(x: Tensor, copy: Tensor, m: int, n: int) -> Tensor:
    return dense_baseline.linear(x, copy, m, n)


def sparse_column(weight: Tensor, scores: Tensor, cell: Cell, x: Tensor) -> Column:
    """The weight pruned as ``cell`` says, packed as the serving path packs it."""
    m, n = weight.shape
    fmt = get_format(cell.pattern)
    mask = scores >= cell.sparsity if cell.pattern == "unstructured" else fmt.mask_from_scores(scores)
    values, metadata = fmt.compress(weight, mask)
    canonical = values.nbytes + metadata.nbytes
    reference = product64(x, weight, mask)
    refusal = packed.refusal(cell.pattern, m, n, values.dtype)
    if refusal:
        raise UserError(f"a {cell.pattern} weight ({m}, {n}) cannot be packed here: {refusal}")
    first = packed.pack(values, metadata, cell.pattern, m, n)
    others = [packed.pack(values, metadata, cell.pattern, m, n) for _ in range(copies_for(first.nbytes) - 1)]

    def run(x: Tensor, copy: Tensor) -> Tensor:
        return packed.packed_linear(x, copy, None, m, n)

    return Column([first, *others], first.nbytes, run, reference, canonical, packed.describe(first)["layout"])


def measure(found: dict[str | Cell, Column], x: Tensor, threads: int, seconds_per_cell: float) -> Iterator[dict]:
    """The rows of one shape, number of tokens and threads."""
    torch.set_num_threads(threads)
    wrong: dict[str | Cell, str] = {}
    rms = {name: column.rms(x) for name, column in found.items()}
    for name, error in rms.items():
        if not error <= MAX_RMS:  # NaN as well
            wrong[name] = f"the relative RMS error of {name} is {error:.2e}, allowed is {MAX_RMS:g}"
    if TORCH in wrong or DENSE in wrong:
        raise SparseRTError(wrong.get(TORCH) or wrong[DENSE])
    timed = {str(name): partial(column, x) for name, column in found.items() if name not in wrong}
    samples = take_turns(
        timed,
        seconds=seconds_per_cell * len(timed),
        min_turns=MIN_TURNS,
        max_turns=MAX_TURNS,
        one_thread=threads == 1,
    )
    for name, column in found.items():
        if isinstance(name, Cell):
            yield row(found, name, column, rms, wrong.get(name), samples)


def row(found, cell: Cell, column: Column, rms: dict, error: str | None, samples: Samples) -> dict[str, Any]:
    """What the row of one sparse cell says besides where and what was measured."""
    dense_bytes = found[TORCH].nbytes
    facts = {
        "pattern": cell.pattern,
        "sparsity": cell.sparsity,
        "layout": column.layout,
        "bytes": {"dense": dense_bytes, "packed": column.nbytes, "canonical": column.canonical_bytes},
        "limit": {
            "packed": round(dense_bytes / column.nbytes, 3),
            "canonical": round(dense_bytes / column.canonical_bytes, 3),
        },
        "rms": {kind: float(f"{rms[name]:.3g}") for kind, name in kinds(found, cell)},
        "error": error,
    }
    return facts if error else facts | times(samples, [(kind, str(name)) for kind, name in kinds(found, cell)])


def kinds(found, cell: Cell) -> list[tuple[str, str | Cell]]:
    """(kind, column) of the columns that a row of ``cell`` compares."""
    return [(kind, name) for kind, name in ((TORCH, TORCH), (DENSE, DENSE), ("sparse", cell)) if name in found]


def times(samples: Samples, compared: list[tuple[str, str]]) -> dict[str, Any]:
    """Times and ratios of a row; ``compared`` are (kind, column) with kinds torch, dense (maybe) and sparse."""
    names = dict(compared)
    clock = samples.clock(*names.values())
    chosen = samples.cpu if clock == "cpu" else samples.wall
    found: dict[str, Any] = {
        "ms": {kind: spread(samples.wall[name], 1e3) for kind, name in compared},
        "cpu_ms": {kind: spread(samples.cpu[name], 1e3) for kind, name in compared} if samples.cpu else None,
        "clock": clock,
    }
    for kind in (TORCH, DENSE):
        found[f"ratio_{kind}"] = ratio(chosen[names[kind]], chosen[names["sparse"]]) if kind in names else None
    noise = {"preempted": samples.preempted(*names.values()), "busy_cores": samples.busy_cores}
    noise["stolen_cores"] = samples.stolen_cores
    found |= {name: None if value is None else round(value, 3) for name, value in noise.items()}
    return found | {"turns": samples.turns}


def shapes_of(groups: Iterable[str], shapes: Iterable[str]) -> list[tuple[int, int]]:
    """The (m, n) that were asked for, each once: those of ``shapes`` when there are any, else those of the groups."""
    wanted = list(shapes)
    for text in wanted:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise UserError(f"--shape {text}: write out_features x in_features, for example 11008x4096")
    if not wanted:
        names = list(GROUPS) if "all" in groups else groups
        wanted = [shape for name in names for shape in GROUPS[name]]
    return [tuple(map(int, text.split("x"))) for text in dict.fromkeys(wanted)]


def used_by(m: int, n: int) -> list[str]:
    """The models and layers that have such a weight."""
    shape = f"{m}x{n}"
    return [
        layer if group == "bars" else f"{group} {layer}"
        for group in GROUPS
        for layer in [GROUPS[group].get(shape)]
        if layer
    ]


def cells_of(patterns: Iterable[str], sparsities: Iterable[float]) -> list[Cell]:
    """The ways to prune; N:M patterns have a sparsity of their own."""
    cells = []
    for pattern in patterns:
        own = get_format(pattern).default_sparsity
        cells += [Cell(pattern, own)] if own is not None else [Cell(pattern, sparsity) for sparsity in sparsities]
    return cells


def estimate(shapes, tokens, threads, columns_each: int, seconds_per_cell: float, itemsize: int) -> float:
    """Seconds that the runs will take, from rates of one quiet Zen 4 core (memory, product, making the weights)."""
    total = 0.0
    for m, n in shapes:
        total += m * n * columns_each * (35e-9 + max(tokens) * 0.03e-9)
        for count in tokens:
            for workers in threads:
                call = max(m * n * itemsize / 20e9, 2 * m * n * count / 200e9) / workers
                turns = min(MAX_TURNS, max(MIN_TURNS, seconds_per_cell / call))
                total += (turns + 2) * call * columns_each
    return total


@click.command()
@click.option("--shape", "shapes", multiple=True, help="MxN (out x in features) instead of a group; repeatable")
@click.option(
    "--group", "groups", multiple=True, type=click.Choice([*GROUPS, "all"]), default=["all"], show_default=True
)
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=TOKENS, show_default=True)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=THREADS, show_default=True)
@click.option("--sparsity", "sparsities", multiple=True, type=click.FloatRange(0, 1, max_open=True), default=SPARSITIES,
              show_default=True, help="of unstructured weights")  # fmt: skip
@click.option("--pattern", "patterns", multiple=True, default=("unstructured", "2:4"), show_default=True)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="own dense: bf16 only"
)
@click.option("--seconds-per-cell", type=float, default=1.0, show_default=True, help="time for one column of one run")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines; rows are appended")
def main(shapes, groups, tokens, threads, sparsities, patterns, dtype, seconds_per_cell, output):
    """Time sparse linear layers against two dense baselines."""
    try:
        wanted, cells = shapes_of(groups, shapes), cells_of(patterns, sparsities)
        rows = run(wanted, sorted(tokens), threads, cells, DTYPES[dtype], seconds_per_cell, output)
    except SparseRTError as error:
        raise click.ClickException(str(error)) from error
    click.echo(report.tables(rows))
    errors = [row["error"] for row in rows if row["error"]]
    if errors:
        raise click.ClickException(f"{len(errors)} cells are wrong; the first: {errors[0]}")


@torch.inference_mode()
def run(shapes, tokens, threads, cells, dtype, seconds_per_cell, output: Path | None) -> list[dict[str, Any]]:
    """Measure everything; rows go to ``output`` as they come."""
    started = time.monotonic()
    expected = estimate(shapes, tokens, threads, len(cells) + 2, seconds_per_cell, dtype.itemsize)
    click.echo(f"about {expected / 60:.0f} minutes on quiet cores", err=True)
    where = {"dtype": str(dtype).removeprefix("torch."), "isa": library.load().isa, "processor": cpu_name()}
    where |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    if dtype == torch.bfloat16 and dense_baseline.unavailable_reason():
        click.echo(f"no second baseline: {dense_baseline.unavailable_reason()}", err=True)
    rows = []
    for m, n in shapes:
        torch.set_num_threads(max(threads))
        x = torch.randn(max(tokens), n, generator=torch.Generator().manual_seed(n)).to(dtype)
        found = columns(m, n, x, cells)
        for count in threads:
            for size in tokens:
                for facts in measure(found, x[:size], count, seconds_per_cell):
                    about = {"m": m, "n": n, "used_by": used_by(m, n), "tokens": size, "threads": count}
                    rows.append(about | facts | where)
                    if output is not None:
                        with output.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
        click.echo(f"{m}x{n} done after {(time.monotonic() - started) / 60:.1f} minutes", err=True)
    return rows


if __name__ == "__main__":
    main()
