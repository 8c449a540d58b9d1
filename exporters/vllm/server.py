"""``python -m sparse_rt.exporters.vllm.server``: vLLM's OpenAI server with the exit codes of ``sparse-rt``.

The arguments are vLLM's own, and so is the process: its output, signals and prompts to the terminal are as without
this module. Only where the start fails over an error of ours is the exit code that error's (2 for a bad model folder)
instead of 1, and the sentence comes last (``failures``).
"""

from __future__ import annotations

import runpy
import sys

from sparse_rt.exporters.vllm.failures import failure, watch

# The `vllm` script of the community CPU wheel looks for a distribution called vllm and fails; the module works.
API_SERVER = "vllm.entrypoints.openai.api_server"


def main() -> None:
    watch()
    try:
        # As the main module, which is what processes that vLLM starts import again.
        runpy.run_module(API_SERVER, run_name="__main__", alter_sys=True)
    except Exception as error:
        found = failure(error)
        if found is None:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(found[1])


if __name__ == "__main__":
    main()
