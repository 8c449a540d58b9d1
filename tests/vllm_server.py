"""A real server for the tests: `sparse-rt serve` in a process of its own, watched until it is healthy."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 600
# Float32 on any model; one unbound thread, because bound ones of test workers beside each other would share a core.
OPTIONS = ("--enforce-eager", "--dtype", "float32")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def environment(**changes: str) -> dict[str, str]:
    """That of the tests without the settings of the machine that runs them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "SPARSE_RT", "CPU_VIS"))}
    return {**kept, **ENVIRONMENT, **changes}


def serve(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sparse_rt", "serve", str(folder), "--", *OPTIONS, *options]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A healthy server: ``url``, ``process`` and the text of its ``log``."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self._log = process, url, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(question).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def wait_until_healthy(self) -> None:
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(1)
        raise AssertionError(f"not healthy after {START_SECONDS} s:\n{self.log[-4000:]}")


@contextlib.contextmanager
def running(folder: Path, log: Path, *options: str, **changes: str):
    """``Server`` of ``sparse-rt serve FOLDER -- OPTIONS``, ended by SIGTERM."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            serve(folder, "--port", str(port), *options), env=environment(**changes), stdout=output, stderr=output
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)
