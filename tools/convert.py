"""``sparse-rt convert``"""

from typing import Any

from sparse_rt.config import ConvertOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show


def report(result: dict[str, Any]) -> None:
    show(str(result))


command = workflow_command(
    ConvertOptions,
    "sparse_rt.workflows.convert:convert",
    report,
    "Prune MODEL (unless --method none), compress its linear weights and save it to DIR.\n\n"
    "Works layer by layer: one decoder block and one shard in memory at a time.",
)
