"""Perplexity of the shipped model after every pruner and repair, with the time and the memory that each takes.

    cd benchmarks
    python pruning_quality.py --output results/pruning_quality.jsonl --jobs 2     # about 15 minutes on two cores
    python pruning_quality_report.py results/pruning_quality.jsonl --plot results/pruning_quality.png

A cell is a method at 2:4, 4:8, or 50, 60, 70 or 75 % unstructured: every pruner that is registered, alone, and those
that only choose a mask or prune column by column with every repair that is registered. Some run again with OWL's ratios
(unstructured) and with transposable masks (N:M). Everything goes through `convert`, with the same 64 sequences of 256
tokens of the shipped calibration text; perplexity is that of the compressed model on the last three quarters of the
held-out text, in windows of 512 tokens, as in quality.py (which calibrates on 128 sequences of 512).

Each cell has a process of its own, on one thread, forked from a server that has imported everything: its seconds are
the processor time of `convert`, its memory what `convert` took at its worst above what the process had before. Cells
that the output file holds already are skipped.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import quality_methods
import torch
from quality import read_rows

from sparse_rt import assets
from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.benchmarking.processes import reset_peak, status_bytes
from sparse_rt.config import ConvertOptions
from sparse_rt.errors import UserError
from sparse_rt.pruning import get_pruner, known_pruners, known_repairs
from sparse_rt.workflows.convert import convert

TARGETS = (
    ("2:4", 0.5),
    ("4:8", 0.5),
    ("unstructured", 0.5),
    ("unstructured", 0.6),
    ("unstructured", 0.7),
    ("unstructured", 0.75),
)
CALIBRATION = {"num_samples": 64, "max_seq_len": 256}
# What is repaired: the other pruners solve for the kept weights themselves.
REPAIRED = ("magnitude", "wanda", "ria", "sparsegpt")
WITH_RATIOS = ("magnitude", "wanda", "sparsegpt", "alps")
UNIFORM, OWL, TRANSPOSABLE = "uniform", "owl", "transposable"
OPTIONS: dict[str, dict[str, Any]] = {UNIFORM: {}, OWL: {"ratios": "owl"}, TRANSPOSABLE: {"transposable": True}}


class Cell(NamedTuple):
    method: str
    pattern: str
    sparsity: float
    variant: str = UNIFORM


def methods() -> list[str]:
    """Every pruner, and the repaired ones with every repair."""
    pruners = [name for name in known_pruners() if get_pruner(name).prunes]
    pairs = itertools.product((name for name in REPAIRED if name in pruners), known_repairs())
    return pruners + ["+".join(pair) for pair in pairs]


def cells() -> list[Cell]:
    found = [Cell("dense", "dense", 0.0)]
    for (pattern, sparsity), method in itertools.product(TARGETS, methods()):
        found.append(Cell(method, pattern, sparsity))
        if pattern == "unstructured" and method in WITH_RATIOS:
            found.append(Cell(method, pattern, sparsity, OWL))
        if pattern != "unstructured" and "+" not in method:
            found.append(Cell(method, pattern, sparsity, TRANSPOSABLE))
    return found


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def measure(cell: Cell) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {**cell._asdict(), **CALIBRATION}
    with tempfile.TemporaryDirectory(prefix="pruning-quality-") as folder:
        pruned = Path(folder) / "pruned"
        if cell.method == "dense":
            row |= quality_methods.perplexities("dense", pruned, (), pruned, 0, None, 0, False)
        else:
            row |= pruned_model(cell, pruned)
            row |= quality_methods.perplexities("pruned", pruned, (), pruned, 0, None, 0, False)
    return row | {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "commit": commit()}


def pruned_model(cell: Cell, folder: Path) -> dict[str, Any]:
    unstructured = {"sparsity": cell.sparsity} if cell.pattern == "unstructured" else {}
    options = {**CALIBRATION, **unstructured, **OPTIONS[cell.variant], "device": "cpu"}
    chosen = dict(model=str(assets.model_dir()), pattern=cell.pattern, method=cell.method)
    wanted = ConvertOptions.build(output_dir=folder, **chosen, **options)
    # What the libraries keep once they have run counts for no method: a short conversion makes them take it before.
    small = {"method": "wanda", "num_samples": 1, "max_seq_len": 8}
    convert(ConvertOptions.build(output_dir=folder.with_name("first"), model=chosen["model"], **small))
    before, start = status_bytes("VmRSS"), time.process_time()
    reset_peak()
    result = convert(wanted)
    seconds, peak = time.process_time() - start, status_bytes("VmHWM") - before
    names = ("mean_sparsity", "mean_reconstruction_error", "compressed_bytes")
    facts = {name: result[name] for name in names if name in result}
    return facts | {"seconds": round(seconds, 2), "peak_bytes": peak}


def _measured(cell: Cell) -> tuple[Cell, dict[str, Any] | None, str]:
    """(cell, row, "") or (cell, None, what went wrong): an error of one cell must not end the others.

    What the product refuses (a method that has no such pattern) is a row, too.
    """
    try:
        return cell, measure(cell), ""
    except UserError as error:
        return cell, {**cell._asdict(), "refused": str(error)}, ""
    except Exception as error:
        return cell, None, f"{type(error).__name__}: {error}"


def run(wanted: list[Cell], jobs: int):
    """Results in the order in which they come, a new process for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pruning_quality"])
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_measured, wanted, chunksize=1)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON lines, appended to")
@click.option("--jobs", default=1, show_default=True, help="cells at once")
@click.option("--method", "names", multiple=True, help="only these methods (repeatable), as in wanda+admm")
@click.option("--pattern", "patterns", multiple=True, help="only these patterns (repeatable)")
def main(output: Path, jobs: int, names: tuple[str, ...], patterns: tuple[str, ...]) -> None:
    unknown = set(names) - {"dense", *methods()}
    if unknown:
        raise click.UsageError(f"unknown method {min(unknown)}; known are dense, {', '.join(methods())}")
    done = {cell_of(row) for row in read_rows(output)}
    wanted = [cell for cell in cells() if cell not in done]
    wanted = [cell for cell in wanted if cell.method in (names or (cell.method,))]
    wanted = [cell for cell in wanted if cell.pattern in (patterns or (cell.pattern,))]
    failed = 0
    for number, (cell, row, problem) in enumerate(run(wanted, jobs), 1):
        if row is None:
            failed += 1
            click.echo(f"{number}/{len(wanted)} {' '.join(map(str, cell))}: {problem}", err=True)
            continue
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = row.get("perplexity", row.get("refused"))
        click.echo(f"{number}/{len(wanted)} {' '.join(map(str, cell))}: {shown} {row.get('seconds', '')}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
