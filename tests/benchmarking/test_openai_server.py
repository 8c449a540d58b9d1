"""A server in a process of its own: the cause when it fails, and nothing left behind however its caller ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_rt.benchmarking import openai_server
from sparse_rt.benchmarking.openai_server import OpenAIServer, cause, compute_cores
from sparse_rt.benchmarking.processes import processor_seconds, session_members
from sparse_rt.errors import SparseRTError

# Stands for vLLM's module: healthy at once, with a process of its own, unless its arguments say otherwise.
SERVER = """
import http.server, subprocess, sys, time
if "--die" in sys.argv:
    print("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] ValueError: no room for the cache")
    print("RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(1)
if "--mute" in sys.argv:
    print("still reading", flush=True)
    time.sleep(600)
subprocess.Popen(["sh", "-c", "while true; do true; done"] if "--burn" in sys.argv else ["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# A shell starts what it runs in the background with SIGINT ignored, and that is inherited: the caller must not be.
CALLER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from sparse_rt.benchmarking import openai_server
openai_server.MODULE = "stand_in"
with openai_server.OpenAIServer(Path("folder"), [], {}) as server:
    print(server.session, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(SERVER)
    monkeypatch.setattr(openai_server, "MODULE", "stand_in")
    return {"PYTHONPATH": str(tmp_path)}


def wait_until_gone(session: int) -> list[int]:
    end = time.monotonic() + 30
    while session_members(session) and time.monotonic() < end:
        time.sleep(0.05)
    return session_members(session)


def test_a_healthy_server_ends_with_everything_it_started(environment):
    with OpenAIServer(Path("folder"), [], environment) as server:
        server.check()
        assert openai_server.answers(server.port) and server.start_s > 0
        assert len(session_members(server.session)) == 3  # the process that watches it, the server, its own process
    assert wait_until_gone(server.session) == []
    assert not openai_server.answers(server.port)


def test_the_processor_time_of_everything_it_started_counts_as_ours(environment):
    """Otherwise a report would take a worker for a neighbour and call its own figures noisy."""

    def of_children():
        return os.times().children_user + os.times().children_system

    before = of_children()
    with OpenAIServer(Path("folder"), ["--burn"], environment) as server:
        while (used := processor_seconds(server.session)) < 1:
            time.sleep(0.1)
    assert of_children() - before >= used


def test_a_server_that_dies_at_the_start_gives_its_cause(environment):
    with pytest.raises(SparseRTError) as failure:
        OpenAIServer(Path("folder"), ["--die"], environment)
    assert "folder ended (exit code 1): ValueError: no room for the cache; the last lines" in str(failure.value)
    assert "See root cause above" in str(failure.value)


def test_a_server_that_is_never_healthy_is_given_up_with_its_log(environment):
    with pytest.raises(SparseRTError, match=r"not healthy after 2 s; the last lines of its log: still reading"):
        OpenAIServer(Path("folder"), ["--mute"], environment, longest=2)


def test_a_server_that_dies_later_is_noticed(environment):
    with OpenAIServer(Path("folder"), [], environment) as server:
        for pid in set(session_members(server.session)) - {server.session}:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(SparseRTError, match=r"folder ended \(exit code -9\)"):
            server.check()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_when_the_caller_ends(environment, end):
    command = [sys.executable, "-c", CALLER]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as caller:
        session = int(caller.stdout.readline())
        assert session_members(session)
        caller.send_signal(end)
        caller.wait(60)
    assert wait_until_gone(session) == []


def test_the_cause_is_the_first_error_that_is_none_at_second_hand():
    log = """
(APIServer pid=1) WARNING 01-02 03:04:05 [base.py:380] ValueError: Tokenizer not available
(Worker pid=3) ERROR 01-02 03:04:05 [worker.py:9] FormatError: sparse_rt: layer 0 is incomplete
(EngineCore pid=2) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert cause(log) == "FormatError: sparse_rt: layer 0 is incomplete"
    wrapped = """
pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig
  Value error, the model has 8 positions [type=value_error, input_value=1]
"""
    assert cause(wrapped) == "the model has 8 positions"
    assert cause("all is well\n") is None


def test_several_threads_are_bound_and_one_is_not():
    assert compute_cores(1) == "nobind"
    if len(os.sched_getaffinity(0)) > 1:
        cores = [int(core) for core in compute_cores(2).split(",")]
        assert len(cores) == 2 and set(cores) <= os.sched_getaffinity(0)
