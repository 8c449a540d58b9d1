"""The dispatch table of a GPU from rows of gpu_suite.py: where each kernel was faster than forming the dense weight.

    python benchmarks/gpu_suite_table.py results/gpu_suite.jsonl              # print the table
    python benchmarks/gpu_suite_table.py results/gpu_suite.jsonl --install    # into kernels/triton/configs/<gpu>.json
    python benchmarks/gpu_suite_table.py results/gpu_suite.jsonl --second-form    # memory for faster prefill: below

gpu_suite.py does both by itself. A number of tokens counts as won when, on every shape of at least a size, nine of ten
turns were faster than the way without the kernel (``scratch_ratio``, 10th percentile above 1). A kernel gets a run of
won numbers of tokens, for few tokens from the smallest measured number on; what was not measured is not used. The rows
for a sparsity hold from one hundredth below it up to the next one.

cuSPARSELt needs a form of its own. It replaces all others where it won at every measured number of tokens and no other
kernel was faster. Otherwise it could be a second form beside mma_sp, 2.25 bytes a weight against the 2 of the dense
one. That is a sparse model larger than the dense one, so only ``--second-form`` writes it, where it won by
``SECOND_FORM_GAIN``.

Experts have no row: nothing can take the place of their kernel. What was measured of them stands beside the versions.
"""

from __future__ import annotations

import checkout  # isort: skip  # noqa: F401

import argparse
import datetime
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from sparse_rt.kernels.triton import configs, dispatch

Row = dict[str, Any]

FROM_THE_FIRST_TOKEN = ("d4", "mma_sp", "linear", "linear_t")
# Rows of a training step, and the kernel that makes the difference to its ``scratch`` way.
TRAINING = {
    "spp": "factors_grad",
    "masklora": "rank_products",
    "seft": "positions_grad",
    "values": "values_grad",
    "dcft": "scale_columns",
}
SECOND_FORM_GAIN = 1.15
SLACK = 0.01  # a weight pruned to 50 % has 49.9 % zeros as often as 50.1 %
FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "triton" / "configs"


def table(rows: list[Row], second_form: bool = False) -> Row:
    """The content of configs/<gpu>.json; launch configurations of a file that is there stay."""
    environment = next((row for row in rows if row["kind"] == "environment"), {})
    gpu = environment.get("gpu") or "no GPU"
    packages = environment.get("packages", {})
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": packages.get("torch"),
        "triton": environment.get("triton"),
        "cuda": environment.get("cuda"),
        "commit": environment.get("commit"),
        "experts": experts_said(rows),
    }
    points = measured_points(rows)
    found = {kernel: kernel_rows(kernel, points) for kernel in dispatch.KERNELS if kernel != "cslt"}
    found["cslt"] = library_rows(rows, points, second_form)
    return {
        "gpu": gpu,
        "kernels": configs.read(configs.file_name(gpu)).get("kernels", {}),
        "dispatch": {kernel: found[kernel] or [{"tokens": 0}] for kernel in dispatch.KERNELS},
        "measured": {name: value for name, value in about.items() if value},
    }


def experts_said(rows: list[Row]) -> str | None:
    """What was measured of experts, in words: their kernel is used whatever it is (``dispatch.ALWAYS_USED``)."""
    ratios = [
        row["ratio"]["median"] for row in rows if row["kind"] == "experts" and "us" in row and not row.get("error")
    ]
    if not ratios:
        return None
    mean, cells = statistics.geometric_mean(ratios), f"{len(ratios)} layers and numbers of tokens"
    return (
        f"time of dense experts / time of compressed ones {mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}; {cells})"
    )


def measured_points(rows: list[Row]) -> dict[tuple, dict[tuple[int, int], bool]]:
    """(kernel, pattern, sparsity) -> {(m n, tokens): won on every shape of this size}."""
    found: dict[tuple, dict[tuple[int, int], bool]] = {}
    for row in rows:
        path = TRAINING.get(row.get("path"), row.get("path"))
        if row.get("error") or path not in dispatch.KERNELS or "scratch_ratio" not in row:
            continue
        place, won = (row["m"] * row["n"], row["tokens"]), row["scratch_ratio"]["p10"] > 1
        part = found.setdefault((path, row["pattern"], row["sparsity"]), {})
        part[place] = part.get(place, True) and won
    return found


def kernel_rows(kernel: str, points: dict[tuple, dict[tuple[int, int], bool]]) -> list[Row]:
    """The rows of one kernel, those with the highest limits first."""
    rows = []
    cells = sorted((key for key in points if key[0] == kernel), key=lambda key: (key[1], -key[2]))
    for _, pattern, sparsity in cells:
        steps: dict[tuple[int, int], int] = {}  # run of tokens -> the smallest size that has it
        found = points[kernel, pattern, sparsity]
        for size in sorted({size for size, _ in found}, reverse=True):
            run = won_run(found, size, kernel in FROM_THE_FIRST_TOKEN)
            if run is not None:
                steps[run] = size
        for (first, last), size in sorted(steps.items(), key=lambda item: -item[1]):
            row = {"pattern": pattern, "weights": size, "tokens": last}
            row |= {} if pattern == "2:4" else {"sparsity": round(sparsity - SLACK, 4)}
            rows.append(row | ({} if first <= 1 else {"from": first}))
    return rows


def won_run(found: dict[tuple[int, int], bool], size: int, from_the_first: bool) -> tuple[int, int] | None:
    """First and last number of tokens of the longest run that all shapes from ``size`` on won; measured at ``size``."""
    numbers = sorted({tokens for _, tokens in found})

    def won(tokens: int) -> bool:
        results = [result for (m_n, count), result in found.items() if count == tokens and m_n >= size]
        return (size, tokens) in found and all(results)

    runs = [list(part) for good, part in itertools.groupby(numbers, won) if good]
    if from_the_first:
        runs = [run for run in runs if run[0] == numbers[0]]
        return (1, runs[0][-1]) if runs else None
    best = max(runs, key=len, default=None)
    return (best[0], best[-1]) if best else None


def library_rows(rows: list[Row], points: dict[tuple, dict[tuple[int, int], bool]], second_form: bool) -> list[Row]:
    """cuSPARSELt: alone, beside mma_sp (``second_form``), or not at all."""
    good = [row for row in rows if not row.get("error") and row.get("path") in ("cslt", "mma_sp") and "us" in row]
    mine = [row for row in good if row["path"] == "cslt"]
    found = kernel_rows("cslt", points)
    if not mine or not found:
        return []
    others = {(row["m"], row["n"], row["tokens"]): row for row in good if row["path"] == "mma_sp"}
    fastest = all(wins(row, others.get((row["m"], row["n"], row["tokens"]))) for row in mine)
    few = {row["tokens"] for row in mine if row["kind"] == "decode"}
    if fastest and {1, 16} <= few:
        smallest = min(row["m"] * row["n"] for row in mine)
        return [{"pattern": "2:4", "weights": smallest, "tokens": None, "replaces": True}]
    if not second_form:
        return []
    many = [row for row in mine if row["kind"] == "prefill"]
    kept = []
    for part in kernel_rows("cslt", {key: only_many(value, many) for key, value in points.items()}):
        inside = [
            row["scratch_ratio"]["median"]
            for row in many
            if row["m"] * row["n"] >= part["weights"] and part.get("from", 1) <= row["tokens"] <= part["tokens"]
        ]
        if statistics.geometric_mean(inside) >= SECOND_FORM_GAIN:
            kept.append(part | {"replaces": False})
    return kept


def wins(row: Row, other: Row | None) -> bool:
    """Faster than forming the dense weight, and not slower than the kernel of another form."""
    slower = other is not None and row["us"]["sparse"]["median"] > other["us"]["sparse"]["median"]
    return row["scratch_ratio"]["p10"] > 1 and not slower


def only_many(found: dict[tuple[int, int], bool], many: list[Row]) -> dict[tuple[int, int], bool]:
    numbers = {row["tokens"] for row in many}
    return {place: won for place, won in found.items() if place[1] in numbers}


def write(rows: list[Row], folder: Path, second_form: bool = False) -> Path:
    """The table as ``folder``/<gpu>.json."""
    content = table(rows, second_form)
    wrong = dispatch.problems(content)
    if wrong:
        raise ValueError(f"the table that was made is wrong: {wrong[0]}")
    file = folder / f"{configs.file_name(content['gpu'])}.json"
    file.write_text(text(content), encoding="utf-8")
    return file


def text(content: Row) -> str:
    """JSON with one row a line."""
    lines = ["{", f'  "gpu": {json.dumps(content["gpu"])},', f'  "measured": {json.dumps(content["measured"])},']
    for section in ("kernels", "dispatch"):
        parts = [
            f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
            for name, rows in content[section].items()
        ]
        end = "," if section == "kernels" else ""
        lines.append(f'  "{section}": {{' + ("\n" + ",\n".join(parts) + "\n  " if parts else "") + "}" + end)
    return "\n".join([*lines, "}"]) + "\n"


def described(content: Row) -> str:
    """The rows for people."""
    lines = []
    for kernel, rows in content["dispatch"].items():
        for row in rows:
            about = ", ".join(f"{name} {value}" for name, value in row.items())
            lines.append(f"- {kernel}: {about}")
    return "## Dispatch table\n\n" + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="JSON lines of the suite")
    parser.add_argument("--install", action="store_true", help="write the table beside the others")
    parser.add_argument("--second-form", action="store_true")
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for path in given.rows for line in path.read_text(encoding="utf-8").splitlines()]
    if given.install:
        print(write(rows, FOLDER, given.second_form))
    else:
        print(text(table(rows, given.second_form)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
