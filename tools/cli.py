"""``sparse-rt``: parse, call one workflow, print, choose the exit code.

Exit codes: 0 done, 1 the run failed, 2 bad usage, configuration or input file, 3 finished but a check failed.
Commands are imported when they are called, so that ``sparse-rt --help`` answers at once.
"""

from __future__ import annotations

import importlib
import sys

import click

from sparse_rt.errors import SparseRTError
from sparse_rt.version import __version__

# name -> one line of help; the command is `command` in sparse_rt.tools.<name with _>.
COMMANDS = {
    "convert": "Prune (unless --method none), compress and save a Hugging Face model.",
    "inspect": "What is inside a model: pattern, sparsity and bytes of every weight.",
    "verify": "Integrity of a model: digests, masks, patterns; or compare two models.",
    "finetune": "Train an adapter on the compressed weights.",
    "merge": "Fold an adapter into the compressed weights, proving that the mask stays.",
    "export": "Write a serving artefact: vllm, onnx, dense, compressed-tensors.",
    "eval": "Perplexity on a text file, or lm-evaluation-harness tasks.",
    "generate": "A quick look at what a model says.",
    "serve": "Serve a model with vLLM (OpenAI API).",
    "bench": "Dense and sparse side by side in one run.",
    "env": "Versions, devices, and the backend of every operation.",
    "demo": "The whole road on the small model that ships with sparse-rt.",
}


class LazyGroup(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"sparse_rt.tools.{name}")
        module.command.name = name
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sparse-rt")
def cli() -> None:
    """Sparse LLM weights that stay compressed from disk to serving."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of ``python -m sparse_rt``; always exits."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, prog_name="sparse-rt", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        code = 2
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; nothing half-written is left under the output's name")
        code = 1
    except SparseRTError as error:
        if debug:
            raise
        _say(str(error))
        code = error.exit_code
    except Exception as error:  # a bug or a failing machine: one sentence, the traceback on request
        if debug:
            raise
        _say(f"{type(error).__name__}: {_first_line(error)} (run again with --debug for the traceback)")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    print(f"sparse-rt: {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    main()
