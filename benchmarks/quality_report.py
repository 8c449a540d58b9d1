"""The rows of quality.py as a table of merged perplexities (mean and spread over seeds), and as a chart.

    cd benchmarks
    python quality_report.py results/quality.jsonl --plot results/quality.png

Where the file holds a cell more than once, the last one counts.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
from quality import BASES, key_of, read_rows

from sparse_rt.optional import require
from sparse_rt.report import markdown_table

Rows = list[dict[str, Any]]
PARITY = ("spp", "spp-float64")
NAMES = {
    "pruned": "pruned",
    "dcft": "DCFT",
    "reconstruct": "local reconstruction",
    "lora-remask": "LoRA, mask applied after",
    "spp": "SPP",
    "masklora": "MaskLoRA",
    "seft": "SEFT",
    "values": "values (all kept)",
}


def title(base: tuple[str, str, float]) -> str:
    pruner, pattern, sparsity = base
    return f"{pattern if ':' in pattern else f'{sparsity:.0%}'.replace('%', ' %')} {pruner}"


def perplexities(rows: Rows, method: str, base: tuple[str, str, float]) -> list[float]:
    """One figure a seed."""
    latest = {key_of(row): row for row in rows if row["kind"] == "run"}
    wanted = (row for row in latest.values() if row["method"] == method)
    return [row["perplexity"] for row in wanted if (row["pruner"], row["pattern"], row["sparsity"]) == base]


def cell(found: list[float]) -> str:
    """Mean, and half of the distance between the extremes where there are several seeds."""
    if not found:
        return "-"
    spread = f" ±{(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread}"


def table(rows: Rows) -> str:
    bases = [base for base in BASES if perplexities(rows, "pruned", base)]
    body = []
    for method, name in NAMES.items():
        found = [perplexities(rows, method, base) for base in bases]
        if any(found):
            trained = [row for row in rows if row["kind"] == "run" and row["method"] == method]
            counts = sorted({row["trainable_parameters"] for row in trained if "trainable_parameters" in row})
            shown = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
            body.append((name, shown, *map(cell, found)))
    dense = cell(perplexities(rows, "dense", BASES[0]))
    header = ["method", "trained parameters", *map(title, bases)]
    return f"Dense: {dense}.\n\n{markdown_table(header, body)}"


def rates(rows: Rows) -> str:
    """Every learning rate that was tried, with the perplexity it was judged by."""
    tried: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "tune":
            tried.setdefault(row["method"], []).append(f"{row['learning_rate']:g}: {row['validation_perplexity']:.2f}")
    return markdown_table(["method", "learning rate: perplexity"], [(k, ", ".join(v)) for k, v in tried.items()])


def parity(rows: Rows) -> str:
    """SPP as trained by the product beside its published equations in float64, seed by seed on the same batches."""
    latest = {key_of(row): row for row in rows if row["kind"] == "run"}.values()
    found = {name: {_place(row): row["perplexity"] for row in latest if row["method"] == name} for name in PARITY}
    ours, exact = (found[name] for name in PARITY)
    body = [
        (
            title(place[:3]),
            place[3],
            f"{ours[place]:.3f}",
            f"{exact[place]:.3f}",
            f"{ours[place] / exact[place] - 1:+.2%}",
        )
        for place in sorted(ours.keys() & exact.keys())
    ]
    return markdown_table(["base", "seed", "SPP", "dense float64", "difference"], body) if body else ""


def _place(row: dict[str, Any]) -> tuple:
    return row["pruner"], row["pattern"], row["sparsity"], row["seed"]


def plot(rows: Rows, path: Path) -> None:
    require("matplotlib", extra="plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bases = [base for base in BASES if perplexities(rows, "pruned", base)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [method for method in NAMES if any(perplexities(rows, method, base) for base in bases)]
    width = 0.85 / len(shown)
    for number, method in enumerate(shown):
        found = [perplexities(rows, method, base) for base in bases]
        places = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(bases))]
        means = [statistics.mean(values) if values else float("nan") for values in found]
        extremes = [(max(v) - min(v)) / 2 if v else 0 for v in found]
        axes.bar(places, means, width, yerr=extremes, label=NAMES[method], error_kw={"linewidth": 0.8})
    dense = statistics.mean(perplexities(rows, "dense", BASES[0]))
    axes.axhline(dense, color="black", linewidth=1, linestyle="--", label="dense")
    axes.set_xticks(range(len(bases)), [title(base) for base in bases])
    axes.set_ylabel("held-out perplexity, merged")
    axes.set_ylim(bottom=0.95 * dense)
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--plot", "picture", type=click.Path(path_type=Path))
def main(file: Path, picture: Path | None) -> None:
    rows = read_rows(file)
    click.echo("\n\n".join(filter(None, (table(rows), rates(rows), parity(rows)))))
    if picture:
        plot(rows, picture)


if __name__ == "__main__":
    main()
