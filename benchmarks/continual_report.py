"""The table and the plot of continual_learning.py.

python continual_report.py [results/continual_learning.jsonl] [--plot results/continual_learning.png]
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from continual_learning import BASES, RESULTS, read_rows
from continual_methods import METHODS

COLUMNS = ("acc", "last", "bwt", "forgetting", "fwt")


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        if row["kind"] == "run":
            found[row["base"], row["method"]].append(row)
    return found


def cell(rows: list[dict[str, Any]], name: str) -> str:
    if name not in rows[0]:  # joint training has no order
        if name not in ("acc", "last"):
            return "-"
        final = [row["perplexities"][-1] for row in rows]
        values = [statistics.geometric_mean(row) if name == "acc" else row[-1] for row in final]
    else:
        values = [row[name] for row in rows]
    mean, spread = mean_and_spread(values)
    shown, form = ((mean, spread), ".2f") if name in ("acc", "last") else ((100 * mean, 100 * spread), "+.1f")
    text = f"{shown[0]:{form}}" + (f" ± {shown[1]:{form.lstrip('+')}}" if len(values) > 1 else "")
    return text if name in ("acc", "last") else f"{text} %"


def table(rows: list[dict[str, Any]], base: str) -> str:
    found = groups(rows)
    lines = [
        "| method | seeds | rate, strength | trained | perplexity, mean | of the last task | BWT | forgetting | FWT |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    untrained = next(iter(found.values()))[0]["perplexities"][0] if found else None
    for (of, _), group in found.items():
        if of == base:
            untrained = group[0]["perplexities"][0]
    if untrained:
        lines.append(f"| none | | | 0 | {statistics.geometric_mean(untrained):.2f} | {untrained[-1]:.2f} | | | |")
    for name in METHODS:
        group = found.get((base, name))
        if group:
            first = group[0]
            strength = "" if first["strength"] is None else f", {first['strength']:g}"
            head = (
                f"| {name} | {len(group)} | {first['learning_rate']:g}{strength} | {first['trainable_parameters']:,} |"
            )
            lines.append(head + "".join(f" {cell(group, column)} |" for column in COLUMNS))
    return "\n".join(lines)


def bar(rows: list[dict[str, Any]], base: str) -> list[str]:
    """Whether DCFT forgets at most half of what SPP does, with the last task within 5 %."""
    found, lines = groups(rows), []
    spp = found.get((base, "spp"))
    for name in METHODS:
        group = found.get((base, name))
        if spp and group and METHODS[name].adapter == "dcft":
            forgetting = [statistics.fmean(row["forgetting"] for row in rows) for rows in (group, spp)]
            last = [statistics.fmean(row["last"] for row in rows) for rows in (group, spp)]
            met = forgetting[0] <= forgetting[1] / 2 and last[0] <= 1.05 * last[1]
            lines.append(
                f"{base} {name}: forgetting {100 * forgetting[0]:.1f} % against {100 * forgetting[1]:.1f} %, last task "
                f"{100 * (last[0] / last[1] - 1):+.1f} %: {'met' if met else 'not met'}"
            )
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Forgetting against the perplexity of the last task, a point a method, bars of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {key: group for key, group in groups(rows).items() if "forgetting" in group[0]}
    bases = [base for base in BASES if any(of == base for of, _ in found)]
    figure = Figure(figsize=(5.2 * len(bases), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        for (of, name), group in found.items():
            if of != base:
                continue
            x, dx = mean_and_spread([row["last"] for row in group])
            y, dy = mean_and_spread([100 * row["forgetting"] for row in group])
            color = "#c0504d" if METHODS[name].adapter == "dcft" else "#3b6ea5"
            axes.errorbar(x, y, dy, dx, fmt="o", color=color, markersize=4, linewidth=0.8)
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel("perplexity of the last task")
        axes.set_ylabel("forgetting (% of a perplexity)")
        axes.set_title(f"pruned {base}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.argument("results", type=click.Path(path_type=Path, exists=True), default=RESULTS)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path))
def main(results: Path, plot_path: Path | None) -> None:
    rows = read_rows(results)
    for base in BASES:
        if any(row["base"] == base and row["kind"] == "run" for row in rows):
            click.echo(f"Pruned {base}:\n\n{table(rows, base)}\n\n" + "\n".join(bar(rows, base)) + "\n")
    if plot_path:
        plot(rows, plot_path)


if __name__ == "__main__":
    main()
