"""``sparse-rt export``"""

from typing import Any

from sparse_rt.config import ExportOptions
from sparse_rt.report import size
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import facts, show, table


def report(result: dict[str, Any]) -> None:
    rows = [(name, size(count)) for name, count in result["files"].items()]
    show(table(f"{result['exporter']} export in {result['output_dir']}", ["file", "bytes>"], rows))
    show(f"{size(result['bytes'])} in all; the dense model has {size(result['dense_bytes'])}")
    for note in result["facts"].get("notes", ()):
        show(note)
    if result["check"]:
        show(facts("check", result["check"]))


command = workflow_command(
    ExportOptions,
    "sparse_rt.workflows.export:export",
    report,
    "Write MODEL for a serving engine: --to vllm, onnx, dense, int8 or compressed-tensors; --check proves it there.",
)
