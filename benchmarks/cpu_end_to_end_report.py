"""The rows of cpu_end_to_end.py as tables for people, with the bars that serving has to reach.

    cd benchmarks
    python cpu_end_to_end_report.py results/cpu_end_to_end.jsonl

Where the file holds a figure more than once, the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from sparse_rt.benchmarking.machine import BUSY_CORES
from sparse_rt.report import markdown_list, markdown_table, quantity

Rows = list[dict[str, Any]]

HALF, SPARSER = ("0.5", "2:4"), ("0.7", "0.75", "0.9")
# Dense time / sparse time that serving has to reach, by what multiplies the dense matrices: at batch 1 and 4 for half
# of the weights and for fewer, then from 16 tokens on.
SPEED_BARS = {
    "oneDNN": {1: (1.8, 2.5), 4: (1.25, 1.6), "many": 0.95},
    "zentorch": {1: (1.6, 2.2), 4: (1.15, 1.5), "many": 0.9},
}
# The worker's weights, sparse / dense, and the start of an engine, sparse time / dense time, at most.
WEIGHT_BARS = {"0.5": 0.60, "2:4": 0.60, "0.75": 0.36}
LOAD_BAR = 1.3


def tables(rows: Rows) -> str:
    """Everything that is worth reading first, as Markdown."""
    rows = latest(rows)
    good = [row for row in rows if not row["error"]]
    parts = [header(good), bars(good)]
    groups: dict[str, Rows] = {}
    for row in good:
        groups.setdefault(title(row), []).append(row)
    parts += [table(name, found) for name, found in groups.items()]
    failed = [f"{row['model']}, {row['part']}: {row['error']}" for row in rows if row["error"]]
    parts += ["## Failed\n\n" + markdown_list(failed)] if failed else []
    return "\n".join(part for part in [*parts, noise(good)] if part)


def latest(rows: Rows) -> Rows:
    """One row a figure, the last, in the order of their first appearance; an error yields to a later success."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        found[identity(row)] = row
    succeeded = {identity(row)[:4] for row in rows if not row["error"]}
    return [row for key, row in found.items() if not row["error"] or key[:4] not in succeeded]


def identity(row: dict[str, Any]) -> tuple:
    bench = row["bench"]
    return (
        row["parameters"],
        row["model"],
        row["part"],
        bench.get("threads"),
        *map(row.get, ("engine", "what", "batch")),
        dense_linear(row),
    )


def dense_linear(row: dict[str, Any]) -> str | None:
    """What multiplied dense matrices in vLLM; None for other engines, files and failures."""
    settings = row["bench"].get("engine_settings") if row.get("engine") == "vllm" else None
    return settings["dense_linear"] if settings else None


def title(row: dict[str, Any]) -> str:
    """The heading of the rows that stand in one table."""
    dense = dense_linear(row)
    return f"{row['part']} (dense: {dense})" if dense else row["part"]


def header(rows: Rows) -> str:
    """Machine and model, once per kind."""
    lines = []
    for row in rows:
        bench = row["bench"]
        packages = ", ".join(f"{name} {version}" for name, version in bench["packages"].items())
        lines.append(
            f"{row['parameters'] / 1e6:.0f} million parameters, {row['linear_parameters'] / row['parameters']:.0%} of "
            f"them in compressed layers; {bench['processor']}, {bench['threads']} of {bench['cores']} cores; "
            f"{packages}; commit {bench['commit']}, {bench['date'][:10]}"
        )
    return "# CPU, end to end: dense / sparse, above 1 sparse is faster or smaller\n\n" + markdown_list(
        dict.fromkeys(lines)
    )


def bar_of(row: dict[str, Any]) -> float | None:
    """The ratio dense / sparse that a row has to reach; None where nothing is asked of it."""
    if row.get("engine") != "vllm":
        return None
    model = row["model"].partition(",")[0]
    if row["phase"] == "memory" and row["what"] == "weights in the worker":
        return 1 / WEIGHT_BARS[model] if model in WEIGHT_BARS else None
    if row["phase"] == "load" and row["what"] == "engine start":
        return 1 / LOAD_BAR
    speeds = SPEED_BARS.get(dense_linear(row))
    if speeds is None or row["phase"] not in ("decode", "prefill"):
        return None
    if row["phase"] == "prefill" or row["batch"] >= 16:
        return speeds["many"]
    return speeds[row["batch"]][model in SPARSER] if row["batch"] in speeds else None


def bars(rows: Rows) -> str:
    """Serving in vLLM against its bars."""
    cells = []
    for row in rows:
        bar = bar_of(row)
        if bar is None:
            continue
        ratio = row["ratio"]
        missed = "" if ratio["median"] >= bar else f"missed by {1 - ratio['median'] / bar:.0%}"
        if ratio["min"] < bar <= ratio["max"]:
            missed = f"{missed or 'reached'}, not in every pair"
        cells.append(
            (
                row["model"],
                f"{row['phase']}, {row['what']}",
                row["batch"] or "",
                row["bench"]["threads"],
                dense_linear(row),
                f"{ratio['median']:.2f}x",
                f"{ratio['min']:.2f}-{ratio['max']:.2f}",
                f"{bar:.2f}x",
                missed or "reached",
            )
        )
    if not cells:
        return ""
    columns = ["model", "", "batch>", "threads>", "dense", "ratio>", "range>", "bar>", ""]
    limits = ", ".join(f"{bar:.2f} at {model}" for model, bar in WEIGHT_BARS.items())
    note = f"Weights of the worker at most {limits} of dense; start at most {LOAD_BAR} times that of dense."
    return f"## Serving in vLLM against its bars\n\n{markdown_table(columns, cells)}\n{note}\n"


def table(name: str, rows: Rows) -> str:
    """All figures of one part against one kind of dense product."""
    cells = []
    for row in rows:
        ratio, speeds = row["ratio"], row["tokens_per_second"]
        cells.append(
            (
                row["model"],
                f"{row['phase']}, {row['what']}" if row["engine"] != "files" else row["what"],
                row["batch"] or "",
                *(quantity(row[side]["median"], row["unit"]) for side in ("dense", "sparse")),
                *(f"{speeds[side]:.1f}" if speeds else "" for side in ("dense", "sparse")),
                f"{ratio['median']:.2f}x",
                f"{ratio['min']:.2f}-{ratio['max']:.2f}",
                f"{row['byte_limit']:.2f}x" if row["phase"] == "decode" else "",
            )
        )
    columns = [
        "model",
        "",
        "batch>",
        "dense>",
        "sparse>",
        "dense tok/s>",
        "sparse tok/s>",
        "ratio>",
        "range>",
        "bytes>",
    ]
    commands = dict.fromkeys(row["bench"]["command"] for row in rows)
    return f"## {name}\n\n{markdown_table(columns, cells)}\n" + markdown_list(f"`{command}`" for command in commands)


def noise(rows: Rows) -> str:
    """Which parts shared the machine with others."""
    busy = {}
    for row in rows:
        cores = max((share for share in row["bench"]["busy"] if share is not None), default=0.0)
        if cores > BUSY_CORES:
            busy[f"{row['model']}, {row['part']}: other processes kept up to {cores:.1f} cores busy"] = None
    return "## Not on an idle machine\n\n" + markdown_list(busy) if busy else ""


def read_rows(files: Iterable[Path]) -> Rows:
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


@click.command(help=__doc__.split("\n")[0])
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files):
    click.echo(tables(read_rows(files)))


if __name__ == "__main__":
    main()
