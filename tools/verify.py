"""``sparse-rt verify``"""

from typing import Any

from sparse_rt.config import VerifyOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import facts, show


def report(result: dict[str, Any]) -> None:
    for note in result["notes"]:
        show(f"note: {note}")
    if result.get("against"):
        against = result["against"]
        masks = ", ".join(f"{state} in {count}" for state, count in against["masks"].items() if count)
        shown = {**against, "masks": f"{masks} of {len(against['weights'])} weights"}
        show(facts(f"against {against['model']}", shown, skip=("model",)))
    if result["ok"]:
        show(f"ok: {result['files']} files, {result['tensors']} tensors, {result['weights']} compressed weights")


command = workflow_command(
    VerifyOptions,
    "sparse_rt.workflows.verify:verify",
    report,
    "Check MODEL: sizes, digests, popcount of masks against values, legality of patterns, config against tensors.",
)
