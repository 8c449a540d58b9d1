"""A benchmark result for people: table, sentence, Markdown, chart, and the report folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_rt.benchmarking.rows import SIDES, comparison
from sparse_rt.checkpoint import output_directory
from sparse_rt.optional import available
from sparse_rt.progress import Progress
from sparse_rt.report import LinePanel, bar_chart, markdown_list, markdown_table, quantity, write_json

COLUMNS = ["engine", "phase", "what", "batch>", "dense>", "sparse>", "ratio>", "range>"]
CHART, MARKDOWN, JSON = "report.png", "report.md", "report.json"


def where_sparse_loses(rows: list[dict[str, Any]]) -> str:
    """A sentence for every pair of models and unit, from the rows."""
    sentences = []
    for unit, word in (("s", "slower"), ("bytes", "larger")):
        places: dict[tuple[str, str], list[str]] = {
            (row["models"]["sparse"], row["models"]["dense"]): [] for row in rows
        }
        for row in rows:
            ratio, models = row["ratio"], row["models"]
            if row["unit"] == unit and round(ratio["median"], 2) < 1:
                doubt = ", but not in every pair" if ratio["max"] >= 1 else ""
                name = row_name(row).removesuffix(comparison(models)).removesuffix(", ")
                places[models["sparse"], models["dense"]].append(f"{name} ({ratio['median']:.2f}x{doubt})")
        for (ours, other), found in places.items():
            if found:
                sentences.append(f"{ours.capitalize()} is {word} than {other} here: {', '.join(found)}.")
    return " ".join(sentences) or "Sparse is neither slower nor larger in any row of this run."


def row_name(row: dict[str, Any]) -> str:
    """A row in a few words."""
    detail = row["what"]
    if row["phase"] in ("prefill", "decode"):
        detail = ", ".join(part for part in (f"batch {row['batch']}", comparison(row["models"])) if part)
    return f"{row['engine']} {row['phase']}, {detail}"


def table_rows(result: dict[str, Any]) -> list[tuple]:
    """The rows as cells of ``COLUMNS``."""
    rows = []
    for row in result["rows"]:
        ratio = row["ratio"]
        rows.append(
            (
                row["engine"],
                row["phase"],
                row["what"],
                row["batch"] or "",
                *(figure(row, side) for side in SIDES),
                f"{ratio['median']:.2f}x",
                "exact"
                if len(ratio["samples"]) == 1 and row["unit"] == "bytes"
                else f"{ratio['min']:.2f}-{ratio['max']:.2f}",
            )
        )
    return rows


def figure(row: dict[str, Any], side: str) -> str:
    """The median of a side; throughput as people know it, tokens a second."""
    if row["metric"] == "output_throughput":
        return quantity(row["tokens_per_second"][side], "tok/s")
    return quantity(row[side]["median"], row["unit"])


# The panels below the ratios: title, unit, and the metrics in it with what their lines are called.
SWEEP_PANELS = (
    ("output throughput", "tokens a second", {"output_throughput": ""}),
    ("time to first token", "s", {"median_ttft": "", "p99_ttft": ", p99"}),
    ("time per output token", "s", {"median_tpot": "", "p99_tpot": ", p99"}),
)


def sweep_panels(rows: list[dict[str, Any]]) -> list[LinePanel]:
    """Throughput and latencies against the request rate, both sides; none without a sweep."""
    served = {(row["metric"], row["request_rate"]): row for row in rows if row["metric"]}
    rates = sorted({rate for _, rate in served}, key=float)
    panels = []
    for title, unit, metrics in SWEEP_PANELS if rates else ():
        panel = LinePanel(title, unit, "requests a second", [f"{float(rate):g}" for rate in rates])
        for metric, suffix in metrics.items():
            for side in SIDES:
                found = [served[metric, rate] for rate in rates]
                speeds = metric == "output_throughput"
                panel.lines[side + suffix] = [
                    row["tokens_per_second"][side] if speeds else row[side]["median"] for row in found
                ]
        panels.append(panel)
    return panels


def write_report(result: dict[str, Any], target: Path, overwrite: bool, progress: Progress) -> None:
    """``report.json``, ``report.md`` and, with matplotlib, ``report.png``; the folder appears whole."""
    chart = available("matplotlib")
    if not chart:
        note = 'no chart: matplotlib is not installed (pip install "sparse-rt[plot]")'
        result["notes"].append(note)
        progress.note(note)
    names = [JSON, MARKDOWN, *([CHART] if chart else [])]
    with output_directory(target, overwrite) as partial:
        result["report"] = [str(target / name) for name in names]
        if chart:
            rows = result["rows"]
            bar_chart(
                partial / CHART,
                [row_name(row) for row in rows],
                [row["ratio"]["median"] for row in rows],
                f"{Path(result['model']).name} ({result['pattern']}, {result['sparsity']:.0%} zeros)\n"
                f"against {Path(result['baseline']).name}",
                "dense / sparse: above 1 sparse is faster or smaller",
                [(row["ratio"]["min"], row["ratio"]["max"]) for row in rows],
                reference=1.0,
                panels=sweep_panels(rows),
            )
        (partial / MARKDOWN).write_text(markdown(result, chart))
        write_json(partial / JSON, result)


def markdown(result: dict[str, Any], chart: bool) -> str:
    """The report as Markdown."""
    settings, speeds = result["settings"], speed_table(result)
    parts = [
        f"# Dense and sparse side by side: {Path(result['model']).name}\n",
        f"{result['pattern']}, {result['sparsity']:.1%} zeros in the compressed layers, {result['dtype']}; baseline: "
        f"{result['baseline']}. {settings['repeats']} repetitions, dense and sparse in turn.\n",
        f"{result['date']}, {result['machine_line']}\n",
        *(f"**Warning:** {warning}.\n" for warning in result["warnings"]),
        markdown_table(COLUMNS, table_rows(result)),
        result["slower"] + "\n",
        *(["![ratios](report.png)\n"] if chart else []),
        "## Tokens a second\n" if speeds else "",
        speeds,
        "## Notes\n",
        markdown_list(result["notes"] + row_notes(result) + engine_notes(result)),
    ]
    return "\n".join(part for part in parts if part)


def speed_table(result: dict[str, Any]) -> str:
    """Medians as tokens a second, for the rows where that means something."""
    rows = [
        (row_name(row), *(quantity(row["tokens_per_second"][side], "") for side in ("dense", "sparse")))
        for row in result["rows"]
        if row["tokens_per_second"] and row["metric"] is None  # a sweep shows its own in the table
    ]
    return markdown_table(["", "dense>", "sparse>"], rows) if rows else ""


def row_notes(result: dict[str, Any]) -> list[str]:
    """One line a note; the rows of a sweep share theirs."""
    names: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["note"]:
            names.setdefault(row["note"], []).append(f"{row['engine']} serve" if row["metric"] else row_name(row))
    return [f"{'; '.join(dict.fromkeys(found))}: {note}" for note, found in names.items()]


def engine_notes(result: dict[str, Any]) -> list[str]:
    """The settings of every engine and the backends of the compressed layers."""
    engines = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict))
        for name, settings in result["engines"].items()
    ]
    backends = [f"{row['tokens']} tokens: {row['op']} {row['backend']}" for row in result["backends"]]
    return [*engines, f"backend of the largest compressed layer in inference: {', '.join(backends)}"]
