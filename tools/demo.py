"""``sparse-rt demo``"""

from typing import Any

from sparse_rt.config import DemoOptions
from sparse_rt.report import size
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def report(result: dict[str, Any]) -> None:
    rows = [(r["model"], f"{r['perplexity']:.2f}", size(r["bytes"]), f"{r['of dense']:.3f}") for r in result["models"]]
    title = f"held-out perplexity at context {result['context_length']}, bytes of the weight files"
    show(table(title, ["model", "perplexity>", "bytes>", "of dense>"], rows))
    show(table("checks", ["check", "outcome"], result["summary"]))
    show(table("time", ["stage", "seconds>"], [(name, f"{value:.1f}") for name, value in result["seconds"].items()]))
    show(f"total {result['total_seconds']:.0f} s; models and report.md are in {result['output_dir']}")


command = workflow_command(
    DemoOptions,
    "sparse_rt.workflows.demo:demo",
    report,
    "Convert, fine-tune, merge, serve and export the small model that ships with sparse-rt, and print one table.\n\n"
    "Offline; a few minutes on two CPU cores.",
    arguments=(),
)
