"""Reports as files: a Markdown table, a JSON object, a bar chart; and figures as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_rt.optional import require

# Units that are scaled for the reader: factor to the next unit, and the names from small to large.
_SCALES = {
    "bytes": (1000.0, ("B", "kB", "MB", "GB", "TB")),
    "s": (1000.0, ("us", "ms", "s")),
}


def size(count: float) -> str:
    """Bytes for people, in decimal units: 1.2 MB."""
    factor, names = _SCALES["bytes"]
    for name in names[:-1]:
        if abs(count) < factor:
            return f"{count:.0f} {name}" if name == "B" else f"{count:.1f} {name}"
        count /= factor
    return f"{count:.1f} {names[-1]}"


def duration(seconds: float) -> str:
    """Seconds for people, to three digits: 12.3 ms, 4.56 s."""
    factor, names = _SCALES["s"]
    value, place = seconds * factor ** (len(names) - 1), 0
    while abs(value) >= factor and place < len(names) - 1:
        value, place = value / factor, place + 1
    return f"{value:.{_digits(value)}f} {names[place]}"


def quantity(value: float, unit: str) -> str:
    """A figure with its unit: ``bytes`` and ``s`` are scaled, anything else is written behind the number."""
    if unit == "bytes":
        return size(value)
    if unit == "s":
        return duration(value)
    return f"{value:,.{_digits(value)}f} {unit}".rstrip()


def _digits(value: float) -> int:
    """Decimals that leave three significant digits of a value from 1 to 1000."""
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a column whose name ends with ">" is right-aligned, as in ``tools.console.table``."""
    lines = [
        _line(column.removesuffix(">") for column in columns),
        _line("---:" if column.endswith(">") else "---" for column in columns),
    ]
    lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_list(items: Iterable[Any]) -> str:
    return "".join(f"- {item}\n" for item in items)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n")


@dataclass
class LinePanel:
    """A small chart: ``lines`` by name, one value for each of the evenly spaced ``ticks``.

    The first word of a name decides the colour of its line, a comma in it makes the line a dashed one.
    """

    title: str
    unit: str
    axis: str
    ticks: list[str]
    lines: dict[str, list[float]] = field(default_factory=dict)


def bar_chart(
    path: Path,
    labels: Sequence[str],
    values: Sequence[float],
    title: str,
    axis: str,
    spans: Sequence[tuple[float, float]] | None = None,
    reference: float | None = None,
    panels: Sequence[LinePanel] = (),
) -> None:
    """Horizontal bars as a PNG; ``spans`` (low, high) become error bars, bars below ``reference`` another colour.

    ``panels`` stand side by side below the bars. Raises ``UserError`` when matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.4 + 0.34 * len(labels), *([2.6] if panels else [])]
    figure = Figure(figsize=(8 if not panels else 11, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), max(len(panels), 1), height_ratios=heights)
    axes = figure.add_subplot(grid[0, :])
    _draw_bars(axes, labels, values, spans, reference)
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10, loc="left")
    for place, panel in enumerate(panels):
        _draw_lines(figure.add_subplot(grid[1, place]), panel)
    figure.savefig(path, dpi=130)


_BAR, _BELOW = "#3b6ea5", "#c0504d"
# From here on one bar would hide the others: they start at the reference, on a logarithmic axis.
_LONG = 12


def _draw_bars(axes, labels, values, spans, reference) -> None:
    # As the label shows it: a bar labelled 1.00 is not below 1.
    below = [reference is not None and round(value, 2) < reference for value in values]
    places = range(len(labels))
    lows, highs = zip(*(spans or [(value, value) for value in values]), strict=True) if values else ((), ())
    right = max([*values, *highs, reference or 0.0], default=1.0)
    logarithmic = bool(reference) and right > _LONG * reference and min([*values, *lows]) > 0
    start = reference if logarithmic else 0.0
    colours = [_BELOW if is_below else _BAR for is_below in below]
    axes.barh(places, [value - start for value in values], left=start, color=colours)
    if spans is not None:
        left = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
        rest = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
        axes.errorbar(values, places, xerr=[left, rest], fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    for place, value, high in zip(places, values, highs, strict=True):
        end = max(value, high, start)
        x = end * 1.05 if logarithmic else end + right * 0.015
        axes.text(x, place, f"{value:.2f}", va="center", fontsize=8)
    if reference is not None:
        axes.axvline(reference, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min([*values, *lows, reference]) / 1.2, right * 1.6)
    else:
        axes.set_xlim(0, right * 1.12)


def _draw_lines(axes, panel: LinePanel) -> None:
    colours: dict[str, str] = {}
    for name, values in panel.lines.items():
        kind = name.partition(",")[0]
        colour = colours.setdefault(kind, ("#7f7f7f", _BAR, _BELOW)[len(colours) % 3])
        style = "--" if "," in name else "-"
        axes.plot(range(len(values)), values, style, color=colour, marker="o", markersize=3, linewidth=1, label=name)
    axes.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.axis, fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.legend(fontsize=7)
