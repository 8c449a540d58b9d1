"""A Python process of its own that calls a function once, or keeps an object alive and calls its methods.

What was loaded or cached before cannot flatter it, settings that libraries read once from the environment stay inside,
and its memory is free afterwards. Requests and answers are JSON lines; the process ends when its caller does, because
the pipe of the requests then ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparse_rt import errors
from sparse_rt.errors import SparseRTError

MODULE = "sparse_rt.child"
# Engines that started processes themselves need a while to end them.
CLOSE_SECONDS = 60
# How often a process that does not answer is looked at.
LOOK_SECONDS = 1.0


class Child:
    """``Child(name)`` starts the process; ``name`` ("vLLM on FOLDER") begins the sentences about its failures.

    Arguments and results must be JSON. Errors of this package keep their class; any other becomes ``SparseRTError``.
    """

    def __init__(self, name: str, environment: dict[str, str] | None = None):
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="sparse-rt-child-")
        self._log = Path(self._scratch.name, "log.txt")
        self._pending = b""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Not the folder of the caller: with -m it would come first on the import path.
                cwd=self._scratch.name,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # so that what it started can be found, and ended with it
            )

    @property
    def pid(self) -> int:
        """Also the session of every process that it started."""
        return self._process.pid

    def call(self, target: str, *arguments: Any, timeout: float | None = None) -> Any:
        """The result of the function ``target`` ("module:function")."""
        return self._ask({"call": target, "arguments": arguments}, timeout)

    def make(self, target: str, *arguments: Any, timeout: float | None = None) -> None:
        """Create and keep the object whose methods ``ask`` calls; its ``close()`` runs at the end if it has one."""
        self._ask({"make": target, "arguments": arguments}, timeout)

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """The result of a method of the kept object; ``SparseRTError`` after ``timeout`` seconds."""
        return self._ask({"ask": method, "arguments": arguments}, timeout)

    def close(self) -> None:
        """End the process and everything it started."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # raised where nothing of the group is left, which is the rule
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any], timeout: float | None) -> Any:
        with contextlib.suppress(BrokenPipeError):  # a process that died is reported with what it wrote last
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._line(timeout))
        if "error" in answer:
            raise getattr(errors, answer["kind"], SparseRTError)(answer["error"])
        return answer["result"]

    def _line(self, timeout: float | None) -> bytes:
        end = None if timeout is None else time.monotonic() + timeout
        output = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            gone = self._process.poll() is not None
            if select.select([output], [], [], 0 if gone else LOOK_SECONDS)[0]:
                chunk = os.read(output, 1 << 20)
                if chunk:
                    self._pending += chunk
                    continue
                self._process.wait()
                gone = True
            if gone:
                raise SparseRTError(f"{self.name} died (exit code {self._process.returncode}): {self._last_words()}")
            if end is not None and time.monotonic() > end:
                raise SparseRTError(f"{self.name} did not answer in {timeout:g} seconds")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or "it wrote nothing"


def in_fresh_process(target: str, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """The result of the function ``target`` ("module:function") in a new interpreter."""
    with Child(f"the process for {target}", environment) as child:
        return child.call(target, *arguments)


def answer(question: dict[str, Any], kept: list[Any]) -> dict[str, Any]:
    """What the process replies; ``kept`` holds at most the object that was made."""
    try:
        arguments = question["arguments"]
        if "ask" in question:
            return {"result": getattr(kept[0], question["ask"])(*arguments)}
        module, name = question.get("call", question.get("make")).split(":")
        found = getattr(importlib.import_module(module), name)(*arguments)
        if "call" in question:
            return {"result": found}
        kept.append(found)
        return {"result": None}
    except Exception as error:
        own = isinstance(error, SparseRTError)
        text = " ".join(str(error).split())
        return {"error": text if own else f"{type(error).__name__}: {text}", "kind": type(error).__name__}


def main() -> None:
    # Libraries write to standard output as they like: it goes to the log, and the pipes are kept under other numbers.
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    kept: list[Any] = []
    for line in requests:
        replies.write(json.dumps(answer(json.loads(line), kept)) + "\n")
        replies.flush()
    for thing in kept:
        getattr(thing, "close", lambda: None)()


if __name__ == "__main__":  # vLLM starts its own processes, which import this module again
    main()
