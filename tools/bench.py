"""``sparse-rt bench``"""

from typing import Any

from sparse_rt.config import BenchOptions
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def report(result: dict[str, Any]) -> None:
    from sparse_rt.workflows.bench import COLUMNS, table_rows

    title = f"{result['model']} ({result['pattern']}, {result['sparsity']:.1%} zeros) against {result['baseline']}"
    show(
        table(title, COLUMNS, table_rows(result)),
        result["slower"],
        f"{result['date']}, {result['machine_line']}",
        *(f"warning: {warning}" for warning in result["warnings"]),
        *(f"note: {note}" for note in result["notes"]),
    )
    if result.get("report"):
        show(f"report: {', '.join(result['report'])}")


command = workflow_command(
    BenchOptions,
    "sparse_rt.workflows.bench:bench",
    report,
    "Measure MODEL (compressed) and a dense baseline in turn, in one run: disk, load, memory, prefill, decode, a "
    "training step and, with --engine vllm --phase serve, OpenAI servers over a sweep of request rates.\n\n"
    "A ratio above 1 means that sparse is faster or smaller.",
)
