"""``sparse-rt serve``"""

import os
import sys

import click

from sparse_rt.tools.console import ConsoleProgress


def run(model: str, vllm_args: tuple[str, ...], debug: bool) -> None:
    from sparse_rt.workflows.serve import serve_command

    argv, environment = serve_command(model, list(vllm_args), ConsoleProgress(quiet=False))
    print(f"-- {' '.join(argv)}", file=sys.stderr, flush=True)
    os.execvpe(argv[0], argv, environment)


command = click.Command(
    None,
    params=[
        click.Argument(["model"], metavar="MODEL"),
        click.Argument(["vllm_args"], nargs=-1, metavar="[-- VLLM ARGS]", type=click.UNPROCESSED),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."),
    ],
    callback=run,
    help="Serve MODEL with vLLM's OpenAI server, after checking that it loads and that the plugin is visible.\n\n"
    "What follows -- goes to vLLM as it is, for example: sparse-rt serve DIR -- --port 8001\n\n"
    "A pruned model that is stored dense is compressed while it loads: sparse-rt serve DIR -- --quantization sparse_rt",
)
