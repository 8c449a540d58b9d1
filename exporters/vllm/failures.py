"""The sentence about a model that cannot be served, as the last thing that the user reads.

vLLM builds the engine in processes of its own. What is wrong with a tensor is said in the middle of their log, and the
process that the user started ends with "Engine core initialization failed. See root cause above". So each of them
leaves the first error of ours that vLLM logs in a file which the front process named, and that one repeats it after its
own traceback. The file appears only when something failed.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from sparse_rt.errors import SparseRTError

FILE_VARIABLE = "SPARSE_RT_FAILURE_FILE"  # inherited by every process that the front process starts
PREFIX = "sparse_rt: "


def watch() -> None:
    """Set up this process of vLLM, whichever it is; harmless when repeated."""
    if multiprocessing.parent_process() is None:
        if not isinstance(sys.excepthook, LastWord):
            file = Path(tempfile.gettempdir(), f"sparse-rt-{os.getpid()}-{secrets.token_hex(8)}.json")
            os.environ[FILE_VARIABLE] = str(file)
            atexit.register(file.unlink, missing_ok=True)
            sys.excepthook = LastWord(sys.excepthook)
        return
    logger = logging.getLogger("vllm")
    if FILE_VARIABLE in os.environ and not any(isinstance(handler, Recorder) for handler in logger.handlers):
        logger.addHandler(Recorder(os.environ[FILE_VARIABLE]))


def own_errors(error: BaseException) -> Iterator[SparseRTError]:
    """Errors of this package behind ``error``: itself, its causes, and what pydantic wraps on vLLM's way through it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, SparseRTError):
            yield found
        if isinstance(found, ValidationError):
            pending += [problem.get("ctx", {}).get("error") for problem in found.errors()]
        pending += [found.__cause__, found.__context__]


def failure(error: BaseException) -> tuple[str, int] | None:
    """(sentence, exit code) of the error of ours behind ``error``, here or in a process of the engine; None if none."""
    for own in own_errors(error):
        return _sentence(own), own.exit_code
    try:
        recorded = json.loads(Path(os.environ[FILE_VARIABLE]).read_text())
    except (KeyError, OSError, ValueError):
        return None
    return recorded["sentence"], recorded["exit_code"]


def _sentence(error: SparseRTError) -> str:
    return PREFIX + " ".join(str(error).split()).removeprefix(PREFIX)


class Recorder(logging.Handler):
    """Writes the first error of ours that is logged with its traceback; the first process to do so wins."""

    def __init__(self, file: str):
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        for own in own_errors(error) if error else ():
            text = json.dumps({"sentence": _sentence(own), "exit_code": own.exit_code})
            try:
                with open(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(text)
            except OSError:  # another process was first, or there is no room for it: the log has it all the same
                pass
            return


class LastWord:
    """``sys.excepthook``: what was there before, then the sentence."""

    def __init__(self, before: Callable):
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        self._before(kind, error, traceback)
        found = failure(error)
        if found and not isinstance(error, SparseRTError):  # else the traceback ended with it
            sys.stderr.write(found[0] + "\n")
            sys.stderr.flush()
