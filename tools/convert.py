"""``sparse-rt convert``"""

from typing import Any

from sparse_rt.config import ConvertOptions
from sparse_rt.report import duration, size
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def report(result: dict[str, Any]) -> None:
    planned = result.get("dry_run")
    if planned:
        rows = [
            (
                module["name"],
                "x".join(map(str, module["shape"])),
                module["pattern"] or f"dense: {module['reason']}",
                size(module["dense_bytes"]),
                size(module["compressed_bytes"]),
            )
            for module in result["modules"]
        ]
        show(table("plan (nothing is written)", ["weight", "shape", "pattern", "dense>", "compressed>"], rows))
        show(f"estimated peak memory: {size(result['estimated_peak_memory_bytes']['total'])}")
        show(f"room needed on the disk: {size(result['needed_disk_bytes'])}")
        if result["estimated_seconds"]:
            show(f"estimated time on this machine: {duration(result['estimated_seconds']['total'])}")
    reasons: dict[str, list[str]] = {}
    for entry in result["skipped"]:
        reasons.setdefault(entry["reason"], []).append(entry["name"])
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        show(f"left dense ({reason}): {', '.join(names[:3])}{more}")
    show(
        f"{'would compress' if planned else 'compressed'} {result['coverage_percent']:.1f} % of the linear weights: "
        f"{size(result['dense_bytes'])} -> {size(result['compressed_bytes'])} ({result['ratio']:.3f} of dense)"
    )
    if not planned:
        found = ", ".join(f"{count} {pattern}" for pattern, count in result["patterns"].items())
        show(f"patterns of the compressed weights: {found}")
        error = result.get("mean_reconstruction_error")
        detail = f", mean reconstruction error {error:.4f}" if error is not None else ""
        show(f"mean sparsity {result['mean_sparsity']:.4f}{detail}, {duration(result['seconds'])}")
        if "permuted" in result:
            shares = list(result["permuted"].values())
            before, after = (sum(share[i] for share in shares) / max(len(shares), 1) for i in (0, 1))
            show(
                f"permuted the inputs of {len(shares)} of {len(result['sparsity'])} weights; they keep {after:.4f} of "
                f"their RIA scores instead of {before:.4f}"
            )
        if "block_error" in result:
            before, after = result["mean_block_error_before"], result["mean_block_error_after"]
            show(f"reconstruction: mean error of a block's output {before:.4f} -> {after:.4f} of its size")
        show(f"saved in {result['output_dir']}")
    for note in result["notes"]:
        show(f"note: {note}")


command = workflow_command(
    ConvertOptions,
    "sparse_rt.workflows.convert:convert",
    report,
    "Prune MODEL (unless --method none), compress its linear weights and save it to DIR.\n\n"
    "Works layer by layer: one decoder block and one shard in memory at a time.",
)
