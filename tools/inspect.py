"""``sparse-rt inspect``"""

from typing import Any

from sparse_rt.config import InspectOptions
from sparse_rt.report import size
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def report(result: dict[str, Any]) -> None:
    totals = result["totals"]
    if result["kind"] == "sparse-rt":
        rows = [
            (
                weight["name"],
                weight["pattern"],
                "x".join(map(str, weight["shape"])),
                f"{weight['sparsity']:.4f}",
                size(weight["bytes"]),
                f"{weight['compression']:.4f}",
            )
            for weight in result["weights"]
        ]
        show(table(result["model"], ["weight", "pattern", "shape", "sparsity>", "bytes>", "of dense>"], rows))
        if result["values"] != "plain":
            per = f"{result['group_size']} columns" if result["group_size"] else "row"
            show(f"values are {result['values']} with a scale per {per}")
        for entry in result["skipped"]:
            show(f"left dense: {entry['name']} ({entry['reason']})")
        show(
            f"{totals['compressed_weights']} of {totals['linear_weights']} linear weights are compressed, "
            f"{totals['coverage_percent']:.1f} % of their bytes, mean sparsity {totals['mean_sparsity']:.4f}",
            f"{size(totals['bytes'])} in all; dense it would be {size(totals['dense_bytes'])} ({totals['ratio']:.3f})",
        )
    else:
        rows = [
            (w["name"], "x".join(map(str, w["shape"])), f"{w['sparsity']:.4f}", ", ".join(w["obeys"]) or "-")
            for w in result["weights"]
        ]
        show(table(f"{result['model']} ({result['kind']})", ["weight", "shape", "sparsity>", "obeys"], rows))
        show(result["suggestion"])
    for note in result["notes"]:
        show(f"note: {note}")


command = workflow_command(
    InspectOptions,
    "sparse_rt.workflows.inspect:inspect",
    report,
    "What is inside MODEL: pattern, sparsity, bytes and compression of every weight, coverage, what was skipped.",
)
