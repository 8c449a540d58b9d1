"""Perplexity of the shipped model: dense, pruned, and repaired by every method with the same training tokens.

    cd benchmarks
    python quality.py --output results/quality.jsonl --workdir /tmp/quality --tune   # learning rates, about 10 minutes
    python quality.py --output results/quality.jsonl --workdir /tmp/quality          # the cells, about 60 core-minutes
    python quality_report.py results/quality.jsonl --plot results/quality.png

Every cell prunes (Wanda or SparseGPT at 2:4, 50, 60 or 70 %), trains for ``--steps`` steps of 4 sequences of 256 tokens
of the shipped fine-tuning text, merges, and measures the *merged, compressed* model on the held-out text in windows of
512 tokens (the last three quarters of it; the first chooses learning rates). Everything but LoRA goes through the
product's own commands. Budgets are those of LoRA with rank 8: SPP with 16 groups, MaskLoRA and SEFT of rank 8.
``values`` trains every kept weight, DCFT one vector a pair.

    spp, masklora, seft, dcft, values    adapters on the compressed weights, merged with `merge`
    lora-remask                          PEFT's LoRA on the same weights stored densely, mask applied after merging
    reconstruct                          `convert --reconstruct`: no training text, the calibration text block by block,
                                         as many steps a block
    spp-float64                          only if asked for: SPP's published equations, dense, the whole model in float64

The learning rate of a method is the best of four (``MULTIPLES`` of its default) on one base, with a seed and a part of
the held-out text that the table does not use. Cells that the output file holds
already are skipped; several processes share the work with ``--part 0/2`` and ``--part 1/2``.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import quality_methods as methods
import torch

from sparse_rt.benchmarking.machine import commit, cpu_name

BASES = tuple(
    (pruner, pattern, sparsity)
    for pattern, sparsity in (("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.6), ("unstructured", 0.7))
    for pruner in ("wanda", "sparsegpt")
)
SEEDS = (0, 1, 2)
TUNING_BASE, TUNING_SEED, MULTIPLES = ("wanda", "unstructured", 0.6), 100, (1, 3, 10, 30)


class Cell(NamedTuple):
    """One row to be. ``kind`` is tune or run, each judged on its part of the text; ``rate`` None: the tuned one."""

    kind: str
    base: tuple[str, str, float]
    method: str
    seed: int
    rate: float | None = None

    @property
    def key(self) -> tuple:
        return self.kind, *self.base, self.method, self.seed, self.rate if self.kind == "tune" else None


def cells(kind: str, names: list[str], seeds: list[int]) -> list[Cell]:
    if kind == "tune":
        return [
            Cell("tune", TUNING_BASE, name, TUNING_SEED, multiple * methods.default_rate(name))
            for name in names
            if name in methods.TRAINED
            for multiple in MULTIPLES
        ]
    plain = [Cell("run", BASES[0], "dense", 0), *(Cell("run", base, "pruned", 0) for base in BASES)]
    return plain + [Cell("run", base, name, seed) for seed in seeds for base in BASES for name in names]


def key_of(row: dict[str, Any]) -> tuple:
    cell = row["kind"], row["pruner"], row["pattern"], row["sparsity"], row["method"], row["seed"]
    return *cell, row["learning_rate"] if row["kind"] == "tune" else None


def tuned_rate(rows: list[dict[str, Any]], method: str) -> float:
    """The learning rate with the lowest perplexity in the trials."""
    tuned = "spp" if method == methods.REFERENCE else method
    tried = [row for row in rows if row["kind"] == "tune" and row["method"] == tuned]
    if not tried:
        raise click.UsageError(f"no learning rate of {method} was tried; run with --tune first")
    return min(tried, key=lambda row: row["validation_perplexity"])["learning_rate"]


def measure(cell: Cell, rows: list[dict[str, Any]], workdir: Path, steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    base = methods.pruned(workdir, cell.base)
    trained = cell.method in (*methods.TRAINED, methods.REFERENCE)
    rate = (cell.rate or tuned_rate(rows, cell.method)) if trained else None
    with tempfile.TemporaryDirectory(prefix=f"{cell.method}-", dir=workdir) as folder:
        room = Path(folder)
        found = methods.perplexities(cell.method, base, cell.base, room, cell.seed, rate, steps, cell.kind == "tune")
    return {
        "kind": cell.kind,
        "pruner": cell.base[0],
        "pattern": cell.base[1],
        "sparsity": cell.base[2],
        "method": cell.method,
        "seed": cell.seed,
        "steps": 0 if cell.method in ("dense", "pruned") else steps,
        "learning_rate": rate,
        **found,
        "cell_seconds": round(time.perf_counter() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "commit": commit(),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON lines, appended to")
@click.option("--workdir", type=click.Path(path_type=Path), required=True, help="folder for the pruned models")
@click.option("--tune", is_flag=True, help="try the learning rates instead of running the cells")
@click.option(
    "--method",
    "names",
    multiple=True,
    type=click.Choice((*methods.METHODS, methods.REFERENCE)),
    help="default: all but spp-float64",
)
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS, show_default=True)
@click.option("--steps", default=48, show_default=True)
@click.option("--part", default="0/1", help="this process takes every k-th cell: INDEX/COUNT")
def main(output: Path, workdir: Path, tune: bool, names: tuple[str, ...], seeds, steps: int, part: str) -> None:
    torch.set_num_threads(1)
    workdir.mkdir(parents=True, exist_ok=True)
    index, count = map(int, part.split("/"))
    wanted = cells("tune" if tune else "run", list(names or methods.METHODS), list(seeds))
    for number, cell in enumerate(wanted):
        rows = read_rows(output)
        if number % count != index or cell.key in {key_of(row) for row in rows}:
            continue
        row = measure(cell, rows, workdir, steps)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: row[name] for name in ("validation_perplexity", "perplexity") if name in row}
        click.echo(f"{number + 1}/{len(wanted)} {cell.key} {row['learning_rate']} {shown} {row['cell_seconds']} s")


if __name__ == "__main__":
    main()
