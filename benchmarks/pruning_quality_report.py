"""The rows of pruning_quality.py as tables of perplexity, time and memory, as a chart, and the order that is expected.

    cd benchmarks
    python pruning_quality_report.py results/pruning_quality.jsonl --plot results/pruning_quality.png

Where the file holds a cell more than once, the last one counts. Ends with exit code 1 when a bar is missed or cannot
be judged because its rows are not there, and says which.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from pruning_quality import OWL, TARGETS, TRANSPOSABLE, UNIFORM, Cell, cell_of
from quality import read_rows

from sparse_rt.optional import require
from sparse_rt.report import markdown_table

Rows = dict[Cell, dict[str, Any]]
DENSE = Cell("dense", "dense", 0.0)
ORDER = ("alps", "sparsegpt", "wanda", "magnitude")  # each at most as high as the next
BARS = (("2:4", 0.5), ("unstructured", 0.6))
VARIANTS = {UNIFORM: "the same ratio everywhere", OWL: "OWL", TRANSPOSABLE: "transposable"}


def latest(rows: list[dict[str, Any]]) -> Rows:
    return {cell_of(row): row for row in rows}


def measured(row: dict[str, Any] | None) -> bool:
    return row is not None and "perplexity" in row


def title(target: tuple[str, float]) -> str:
    pattern, sparsity = target
    return pattern if pattern != "unstructured" else f"{sparsity:.0%}".replace("%", " %")


def names(rows: Rows, variant: str) -> list[str]:
    """Methods in the order of their rows."""
    return list(dict.fromkeys(cell.method for cell in rows if cell.variant == variant and cell != DENSE))


def table(rows: Rows, variant: str) -> str:
    """Perplexities ("-": not measured, or refused), and of each method the longest time and the most memory."""
    targets = [t for t in TARGETS if any(c[1:3] == t and c.variant == variant for c in rows)]
    body = []
    for method in names(rows, variant):
        own = [rows.get(Cell(method, *target, variant)) for target in targets]
        found = [row for row in own if measured(row)]
        if found:
            seconds, peak = (max(row[name] for row in found) for name in ("seconds", "peak_bytes"))
            shown = [f"{row['perplexity']:.2f}" if measured(row) else "-" for row in own]
            body.append((method, *shown, f"{seconds:.1f}", f"{peak / 1e6:.0f}"))
    return markdown_table(["method", *map(title, targets), "CPU seconds>", "MB>"], body)


def bars(rows: Rows) -> list[tuple[bool | None, str]]:
    """(kept, or None when a row is missing; what is compared, with its figures)."""
    pairs = [(target, low, high) for target in BARS for low, high in pairwise(ORDER)]
    found = [_compared(rows, *pair, strict=False) for pair in pairs]
    return found + [_compared(rows, target, "wanda+admm", "wanda", strict=True) for target in BARS]


def _compared(rows: Rows, target: tuple[str, float], low: str, high: str, strict: bool) -> tuple[bool | None, str]:
    sign = "<" if strict else "<="
    pair = [rows.get(Cell(method, *target)) for method in (low, high)]
    words = f"{title(target)}: {low} {sign} {high}"
    if not all(map(measured, pair)):
        return None, f"{words}: not measured"
    first, second = (row["perplexity"] for row in pair)
    kept = first < second if strict else first <= second
    return kept, f"{words}: {first:.2f} and {second:.2f}"


def plot(rows: Rows, path: Path) -> None:
    """Perplexity against the pattern, a line a method: without repairs on the left, with them on the right."""
    require("matplotlib", extra="plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, repaired in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for variant, style in ((UNIFORM, "-"), (OWL, ":"), (TRANSPOSABLE, "--")):
            for method in names(rows, variant):
                if ("+" in method) == repaired:
                    label = method if variant == UNIFORM else f"{method}, {VARIANTS[variant]}"
                    found = [rows.get(Cell(method, *target, variant)) for target in TARGETS]
                    values = [row["perplexity"] if measured(row) else float("nan") for row in found]
                    axes.plot(range(len(TARGETS)), values, style, marker="o", markersize=3, linewidth=1, label=label)
        if measured(rows.get(DENSE)):
            axes.axhline(rows[DENSE]["perplexity"], color="black", linewidth=1, label="dense")
        axes.set_xticks(range(len(TARGETS)), map(title, TARGETS))
        axes.set_yscale("log")
        axes.set_title("pruner and repair" if repaired else "pruners alone")
        axes.legend(ncols=2, fontsize=6)
    figure.axes[0].set_ylabel("held-out perplexity (context 512)")
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--plot", "picture", type=click.Path(path_type=Path))
def main(file: Path, picture: Path | None) -> None:
    rows = latest(read_rows(file))
    if DENSE in rows:
        click.echo(f"Dense: {rows[DENSE]['perplexity']:.2f}.")
    for variant, words in VARIANTS.items():
        if names(rows, variant):
            click.echo(f"\n{words[0].upper()}{words[1:]}:\n\n{table(rows, variant)}")
    if picture:
        plot(rows, picture)
    judged = bars(rows)
    click.echo("\n" + "\n".join(f"{'kept' if kept else 'missed'}: {words}" for kept, words in judged))
    if not all(kept for kept, _ in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
