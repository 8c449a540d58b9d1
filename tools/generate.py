"""``sparse-rt generate``"""

from typing import Any

from sparse_rt.config import GenerateOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show


def report(result: dict[str, Any]) -> None:
    show(result["prompt"] + result["text"], f"[{result['tokens_per_second']} tokens a second, {result['engine']}]")


command = workflow_command(
    GenerateOptions,
    "sparse_rt.workflows.generate:generate",
    report,
    "Continue a prompt greedily with MODEL (dense or compressed).",
)
