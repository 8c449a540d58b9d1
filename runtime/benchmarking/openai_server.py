"""vLLM's OpenAI server on one folder, in a process of its own that ends with this one.

The server runs under a ``Child``: that ends it when this process closes it, raises, is interrupted or is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparse_rt.benchmarking.processes import session_members
from sparse_rt.child import Child
from sparse_rt.errors import SparseRTError

# The `vllm` script of the community CPU wheel looks for a distribution called vllm and fails; the module works.
MODULE = "vllm.entrypoints.openai.api_server"
HOST = "127.0.0.1"
SERVED_NAME = "model"
START_SECONDS, STOP_SECONDS, REAP_SECONDS, LOOK_SECONDS = 1800.0, 30.0, 5.0, 0.5
SET_CHILD_SUBREAPER = 36  # of Linux's prctl
LAST_LINES = 4
# "(EngineCore pid=12) ERROR 11-25 17:22:55 [core.py:380] " before the text, all of it or a part.
PREFIX = re.compile(r"^(?:\([^)]* pid=\d+\) ?)?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Exit): ")
# pydantic's sentence about an error of ours or vLLM's stands below its own.
WRAPPED = "Value error, "
# What the front process says when the reason is in the log of another process.
SECOND_HAND = ("initialization failed", "failed to start", "See root cause above")


class OpenAIServer:
    """A server that answers on ``port`` of this machine alone; a context manager.

    ``arguments`` are vLLM's own. ``session`` is that of all its processes, ``start_s`` the seconds until it was
    healthy. ``SparseRTError`` when it ends before that, with the cause and the last lines of its log, and when it is
    not healthy after ``longest`` seconds.
    """

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str], longest: float = START_SECONDS):
        self.folder, self.port = folder, free_port()
        address = ["--host", HOST, "--port", str(self.port), "--served-model-name", SERVED_NAME]
        command = [sys.executable, "-m", MODULE, "--model", str(folder.absolute()), *address, *arguments]
        start = time.monotonic()
        self._child = Child(f"the process of the OpenAI server for {folder}", environment)
        try:
            self._child.make(f"{__name__}:ServerProcess", command)
            self._wait_until_healthy(start + longest, longest)
        except BaseException:
            self._child.close()
            raise
        self.start_s = time.monotonic() - start
        self.session = self._child.pid

    def check(self) -> None:
        """``SparseRTError`` with the cause when the server has ended."""
        ended = self._child.ask("ended")
        if ended is not None:
            raise SparseRTError(f"the OpenAI server for {self.folder} ended {ended}")

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_healthy(self, end: float, longest: float) -> None:
        while not answers(self.port):
            self.check()
            if time.monotonic() > end:
                raise SparseRTError(
                    f"the OpenAI server for {self.folder} was not healthy after {longest:g} s; the last lines of its "
                    f"log: {self._child.ask('last_lines')}"
                )
            time.sleep(LOOK_SECONDS)


class ServerProcess:
    """The server as its ``Child`` keeps it; its output goes to a file."""

    def __init__(self, command: list[str]):
        self._scratch = tempfile.TemporaryDirectory(prefix="sparse-rt-server-")
        self._log = Path(self._scratch.name, "log.txt")
        with self._log.open("w") as log:
            adopt_orphans()
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ended(self) -> str | None:
        """None while it runs, else how it ended and why."""
        code = self._process.poll()
        if code is None:
            return None
        log = self._log.read_text(errors="replace")
        found = cause(log)
        return f"(exit code {code}): {f'{found}; ' if found else ''}the last lines of its log: {last_lines(log)}"

    def last_lines(self) -> str:
        return last_lines(self._log.read_text(errors="replace"))

    def close(self) -> None:
        """Let it end its own processes, then end what is left of the session."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        for pid in set(session_members(os.getsid(0))) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):  # it ended since the listing
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        reap()
        self._scratch.cleanup()


def adopt_orphans() -> None:
    """Become the parent of processes below this one whose own parent ends before them, where the system can.

    A worker of vLLM is one. Only who waits for a process gets its processor time added to that of its children, and
    what is not there is taken for the work of others (``machine.Neighbours``).
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap() -> None:
    """Wait for every child of this process that has ended or is about to."""
    end = time.monotonic() + REAP_SECONDS
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether a server on this machine says that it is healthy; asked directly, without the proxies of a user."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def cause(log: str) -> str | None:
    """The first exception that a log of vLLM's processes reports as an error and that does not only point to another.

    The process that serves ends with "Engine core initialization failed. See root cause above."
    """
    wrapped = False
    for line in log.splitlines():
        prefix = PREFIX.match(line)
        text = line[prefix.end() :].strip()
        if wrapped and text.startswith(WRAPPED):
            return text.removeprefix(WRAPPED).partition(" [type=")[0]
        first_hand = EXCEPTION.match(text) and not any(words in text for words in SECOND_HAND)
        wrapped = wrapped or "ValidationError: " in text
        if first_hand and not wrapped and prefix["level"] in (None, "ERROR", "CRITICAL"):
            return text
    return None


def last_lines(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:]) or "none"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def compute_cores(threads: int) -> str:
    """The cores for ``threads`` threads, as VLLM_CPU_OMP_THREADS_BIND wants them; one thread may go where it likes.

    A server is three processes that poll. Threads that are not bound wait for each other while one of those runs.
    """
    if threads == 1 or not hasattr(os, "sched_getaffinity"):
        return "nobind"
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
