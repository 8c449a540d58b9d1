"""``sparse-rt eval``"""

from typing import Any

from sparse_rt.config import EvalOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def report(result: dict[str, Any]) -> None:
    if "tasks" in result:
        rows = []
        for task, scores in result["tasks"].items():
            rows += [(task, name, value) for name, value in scores.items() if isinstance(value, float)]
        show(table(result["model"], ["task", "metric", "value>"], rows))
        return
    show(
        f"perplexity {result['perplexity']:.4f} at context {result['context_length']} "
        f"({result['tokens']} tokens of {result['dataset']}, {result['seconds']} s)"
    )


command = workflow_command(
    EvalOptions,
    "sparse_rt.workflows.eval:eval",
    report,
    "Perplexity of MODEL (dense or compressed) on a text, with the context length; or lm-evaluation-harness --tasks.",
)
