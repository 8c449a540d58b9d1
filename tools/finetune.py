"""``sparse-rt finetune``"""

from typing import Any

import click

from sparse_rt.config import FinetuneOptions
from sparse_rt.report import duration
from sparse_rt.tools.command import workflow_command
from sparse_rt.tools.console import show, table


def build(options_class: type[FinetuneOptions], given: dict[str, Any], extra: list[str]) -> FinetuneOptions:
    from sparse_rt.workflows.finetune_options import finetune_options

    return finetune_options(given, given.pop("config", None), given.pop("assignments", ()), extra)


def report(result: dict[str, Any]) -> None:
    rows = [
        ("adapter", f"{result['adapter']}, {result['trainable_parameters']:,} trainable parameters"),
        ("data", f"{result['dataset']} ({result['rows']} rows)"),
        ("steps", f"{result['steps']} in {duration(result['seconds'])}, {result['tokens_per_second']} tokens a second"),
        ("loss", f"{result['first_loss']} -> {result['last_loss']}"),
    ]
    if "distillation" in result:
        weights = ", ".join(f"{name} {result['distillation'][name]:g}" for name in ("ce", "kl", "squarehead"))
        rows.insert(3, ("weights of the losses", weights))
    show(table(f"adapter of {result['model']} in {result['output_dir']}", ["", ""], rows))
    show(f"next: sparse-rt merge {result['model']} {result['output_dir']} -o MERGED")


command = workflow_command(
    FinetuneOptions,
    "sparse_rt.workflows.finetune:finetune",
    report,
    "Train an adapter on the compressed weights of MODEL and write it to DIR.\n\n"
    "Options of the adapter (--groups 8) and transformers' TrainingArguments (--learning-rate 1e-3 --max-steps 200) "
    "are taken by their own names, as flags, as --set NAME=VALUE or in the YAML file of --config; flags win.",
    build=build,
    hidden=("adapter_options", "trainer"),
    extra=(
        click.Option(["--config"], metavar="FILE.yaml", help="Options as a YAML file, by the names of the flags."),
        click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help="One option; repeatable."),
    ),
)
