"""``sparse-rt merge``"""

from typing import Any

from sparse_rt.config import MergeOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import facts, show


def report(result: dict[str, Any]) -> None:
    show(facts(f"merged model in {result['output_dir']}", result, skip=("output_dir",)))


command = workflow_command(
    MergeOptions,
    "sparse_rt.workflows.merge:merge",
    report,
    "Fold ADAPTER into the compressed weights of MODEL, prove that mask and logits hold, and write the result to DIR.",
    arguments=("model", "adapter"),
)
