"""Run a function of this package in a fresh process: nothing that was loaded or cached before can flatter it.

A request and an answer travel as JSON files, because engines write to standard output as they like.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparse_rt.errors import SparseRTError

MODULE = "sparse_rt.benchmarking.worker"


def in_fresh_process(target: str, request: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """``target`` ("module:function") applied to ``request`` in a new interpreter; both must be JSON.

    Raises ``SparseRTError`` with the last line that the process wrote when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-rt-worker-") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps({"target": target, "request": request}))
        command = [sys.executable, "-m", MODULE, str(question), str(answer)]
        # From the temporary folder: with -m the current folder comes first on the import path.
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode != 0 or not answer.is_file():
            written = (done.stderr.strip() or done.stdout.strip()).splitlines()
            reason = next((line.strip() for line in reversed(written) if line.strip()), "it wrote nothing")
            raise SparseRTError(f"the benchmark process for {target} failed (exit code {done.returncode}): {reason}")
        return json.loads(answer.read_text())


def main(question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    module, function = asked["target"].split(":")
    result = getattr(importlib.import_module(module), function)(asked["request"])
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts its own processes, which import this module again
    main(*sys.argv[1:])
