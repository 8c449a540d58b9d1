"""The rows of gpu_suite.py as tables for people: what passed, what was reached, what lost to dense.

python benchmarks/gpu_suite_report.py results/gpu_suite.jsonl
"""

from __future__ import annotations

import checkout  # isort: skip  # noqa: F401

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_rt.report import markdown_list, markdown_table

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Bar:
    """A ratio to cuBLAS that the geometric mean over the shapes of the 8B model is to reach."""

    name: str
    ratio: float
    fits: Callable[[Row], bool]


def _decode(pattern: str, sparsity: float, low: int, high: int) -> Callable[[Row], bool]:
    return lambda row: (
        row["kind"] == "decode"
        and row["path"] in ("d4", "mma_sp")
        and (row["pattern"], row["sparsity"]) == (pattern, sparsity)
        and low <= row["tokens"] <= high
    )


def _prefill(sparse: bool, least: int) -> Callable[[Row], bool]:
    return lambda row: row["kind"] == "prefill" and (row["pattern"] == "2:4") == sparse and row["tokens"] >= least


def _training(sparse: bool) -> Callable[[Row], bool]:
    return lambda row: row["kind"] == "training" and row["path"] == "values" and (row["pattern"] == "2:4") == sparse


BARS = (
    Bar("2:4 decode, 1 to 16 tokens", 1.5, _decode("2:4", 0.5, 1, 16)),
    Bar("50% decode, 1 to 4 tokens", 1.2, _decode("unstructured", 0.5, 1, 4)),
    Bar("70% decode, 1 to 4 tokens", 1.8, _decode("unstructured", 0.7, 1, 4)),
    Bar("75% decode, 1 to 4 tokens", 2.1, _decode("unstructured", 0.75, 1, 4)),
    Bar("90% decode, 1 to 4 tokens", 3.5, _decode("unstructured", 0.9, 1, 4)),
    Bar("50% decode, 8 to 16 tokens", 1.0, _decode("unstructured", 0.5, 8, 16)),
    Bar("75% decode, 8 to 16 tokens", 1.3, _decode("unstructured", 0.75, 8, 16)),
    Bar("2:4 prefill, 2048 tokens and more", 1.15, _prefill(True, 2048)),
    Bar("unstructured prefill, 8192 tokens", 0.9, _prefill(False, 8192)),
    Bar("training step, 2:4", 1.0, _training(True)),
    Bar("training step, unstructured", 0.9, _training(False)),
)
BAR_MODEL = "Llama-3-8B"
DENSE_EXPERTS = ("loop", "grouped")  # gpu_suite_experts.py
BASELINES = ("official_spp", "lora", "masked_dense")  # of training costs, training_cost_baselines.py


def report(rows: Rows) -> str:
    """All tables, as Markdown."""
    good = [row for row in rows if not row.get("error")]
    parts = [environment_line(good), checks(rows), bars(good)]
    for kind, title in (("decode", "Decode"), ("prefill", "Prefill")):
        for tokens, path in sorted({(row["tokens"], row["path"]) for row in good if row["kind"] == kind}):
            chosen = [r for r in good if (r["kind"], r.get("tokens"), r.get("path")) == (kind, tokens, path)]
            parts.append(grid(f"{title}, {tokens} tokens, {path}: cuBLAS time / sparse time", chosen))
    for path in sorted({row["path"] for row in good if row["kind"] == "training"}):
        parts.append(training([row for row in good if row["kind"] == "training" and row["path"] == path], path))
    for path in sorted({row["path"] for row in good if row["kind"] == "cost"}):
        parts.append(cost([row for row in good if row["kind"] == "cost" and row["path"] == path], path))
    parts += [experts(good), generation(good), slower(good), errors(rows), skipped(rows)]
    return "\n".join(part for part in parts if part)


def environment_line(rows: Rows) -> str:
    found = [row for row in rows if row["kind"] == "environment"]
    return "\n".join(row["machine"] for row in found) + "\n"


def checks(rows: Rows) -> str:
    found = [row for row in rows if row["kind"] == "check"]
    failed = sum(bool(row.get("error")) for row in found)
    return f"## Checks\n\n{len(found) - failed} of {len(found)} passed.\n" if found else ""


def median(row: Row) -> float:
    return row["ratio"]["median"]


def bars(rows: Rows) -> str:
    lines = []
    for bar in BARS:
        chosen = best([row for row in rows if row.get("model") == BAR_MODEL and "ratio" in row and bar.fits(row)])
        if chosen:
            ratios = [median(row) for row in chosen]
            mean = statistics.geometric_mean(ratios)
            reached = "yes" if mean >= bar.ratio else "no"
            lines.append((bar.name, bar.ratio, f"{mean:.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", reached))
    if not lines:
        return ""
    columns = ("", "bar>", "geometric mean>", "lowest>", "highest>", "reached")
    return f"## Bars, shapes of {BAR_MODEL}, ratio to cuBLAS\n\n{markdown_table(columns, lines)}"


def best(rows: Rows) -> Rows:
    """The faster path of every cell: what a dispatch table would choose."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("kind", "m", "n", "tokens", "pattern", "sparsity"))
        if key not in found or median(found[key]) < median(row):
            found[key] = row
    return list(found.values())


def cell(row: Row) -> str:
    return row["pattern"] if ":" in row["pattern"] else f"{row['sparsity']:.0%}"


def grid(title: str, rows: Rows) -> str:
    """Shapes by cells: the median ratio and the microseconds of the dense product."""
    cells = list(dict.fromkeys(cell(row) for row in rows))
    shapes: dict[tuple, Rows] = {}
    for row in rows:
        shapes.setdefault((row["model"], row["layer"], row["m"], row["n"]), []).append(row)
    lines = []
    for (model, layer, m, n), part in shapes.items():
        by_cell = {cell(row): row for row in part}
        ratios = [f"{median(by_cell[name]):.2f}" if name in by_cell else "" for name in cells]
        lines.append((f"{model} {layer}", f"{m}x{n}", f"{part[0]['us']['dense']['median']:.1f}", *ratios))
    columns = ("layer", "shape", "dense us>", *(f"{name}>" for name in cells))
    return f"## {title}\n\n{markdown_table(columns, lines)}"


def training(rows: Rows, path: str) -> str:
    lines = []
    for row in rows:
        adamw, held = row["with_adamw"], row["training_bytes"]
        lines.append(
            (
                *(f"{row['model']} {row['layer']}", row["tokens"], cell(row)),
                *(f"{row['us']['dense']['median']:.0f}", f"{median(row):.2f}", f"{median(adamw):.2f}"),
                *(f"{row['sparse_bytes'] / row['dense_bytes']:.2f}", f"{held['sparse'] / held['dense']:.2f}"),
            )
        )
    columns = ("layer", "tokens>", "weight", "dense us>", "ratio>", "with AdamW>", "weight bytes>", "training bytes>")
    return f"## Training step, {path}: forward and backward, dense / sparse\n\n{markdown_table(columns, lines)}"


def cost(rows: Rows, path: str) -> str:
    """What a step costs against those on a dense weight, in time and in memory beyond the weights."""
    lines = []
    for row in rows:
        peaks = row.get("peak_bytes", {})
        mega = [f"{peaks[name] / 1e6:.0f}" if name in peaks else "" for name in ("official_spp", "lora", "sparse")]
        ratios = [row["ratios"].get(name, {}).get("median") for name in BASELINES]
        scratch = row.get("scratch_ratio", {}).get("median")
        lines.append(
            (
                *(f"{row['model']} {row['layer']}", row["tokens"], cell(row)),
                f"{row['us']['sparse']['median']:.0f}",
                *("" if value is None else f"{value:.2f}" for value in (*ratios, scratch)),
                *mega,
            )
        )
    columns = ("layer", "tokens>", "weight", "us>", "official SPP>", "LoRA>", "masked dense>", "without kernel>")
    table = markdown_table((*columns, "peak MB official SPP>", "LoRA>", "this>"), lines)
    return f"## Cost of a training step, {path}: time of each / time of this\n\n{table}"


def experts(rows: Rows) -> str:
    """Mixtures of experts against both dense ways."""
    lines = []
    for row in rows:
        if row["kind"] == "experts":
            dense, ratios = row["baseline_us"], row["ratios"]
            lines.append(
                (
                    *(row["model"], row["layer"], row["tokens"], row["chosen_experts"], cell(row)),
                    f"{row['us']['sparse']['median']:.1f}",
                    *(f"{dense[name]['median']:.1f}" if name in dense else "" for name in DENSE_EXPERTS),
                    *(f"{ratios[name]['median']:.2f}" if name in ratios else "" for name in DENSE_EXPERTS),
                    f"{row['sparse_bytes'] / row['dense_bytes']:.2f}",
                )
            )
    if not lines:
        return ""
    columns = ("model", "layer", "tokens>", "chosen>", "weight", "us>", "loop us>", "grouped us>")
    table = markdown_table((*columns, "loop / sparse>", "grouped / sparse>", "weight bytes>"), lines)
    return f"## Experts: dense products in a loop, torch's grouped product, and the kernel\n\n{table}"


def generation(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["kind"] == "generate":
            speed, size = row["generate_tokens_per_second"], row["weight_bytes"]
            lines.append(
                (
                    *(cell(row), row["batch"], f"{row['ms']['dense']['median']:.2f}"),
                    *(f"{row['ms']['sparse']['median']:.2f}", f"{median(row):.2f}"),
                    *(f"{speed['dense']:.0f}", f"{speed['sparse']:.0f}"),
                    *(f"{size['dense'] / 1e9:.2f}", f"{size['sparse'] / 1e9:.2f}"),
                )
            )
    if not lines:
        return ""
    columns = ("weights", "batch>", "dense ms>", "sparse ms>", "ratio>", "generate dense tok/s>", "sparse tok/s>")
    table = markdown_table((*columns, "dense GB>", "sparse GB>"), lines)
    return f"## Decode step of the whole model (CUDA graph), and generate\n\n{table}"


def slower(rows: Rows) -> str:
    lost = [row for row in best([row for row in rows if "ratio" in row and "m" in row]) if median(row) < 1]
    names = (
        f"{row['kind']} {row['model']} {row['layer']}, {row['tokens']} tokens, {cell(row)}: {median(row):.2f}"
        for row in sorted(lost, key=median)
    )
    return f"## Slower than dense\n\n{markdown_list(names)}" if lost else ""


def errors(rows: Rows) -> str:
    found = [f"{title(row)}: {row['error']}" for row in rows if row.get("error")]
    return f"## Errors\n\n{markdown_list(found)}" if found else ""


def skipped(rows: Rows) -> str:
    found = [f"{title(row)}: {row['reason']}" for row in rows if row["kind"] == "skipped"]
    return f"## Skipped\n\n{markdown_list(found)}" if found else ""


def title(row: Row) -> str:
    names = ("kind", "group", "task", "check", "model", "layer", "tokens", "pattern", "sparsity", "path", "dtype")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)


def main(paths: Iterable[str]) -> None:
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        print(report([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main(sys.argv[1:])
