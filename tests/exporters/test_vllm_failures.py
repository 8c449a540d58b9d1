"""The last line of a failed start: found behind any chain of errors, handed on by the process that had it, once."""

import logging
import os
import subprocess
import sys

from pydantic import BaseModel, field_validator

from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.exporters.vllm.failures import FILE_VARIABLE, LastWord, Recorder, failure, own_errors


class Model(BaseModel):
    """Stands for vLLM's configuration, where pydantic wraps what a validator raises."""

    path: str

    @field_validator("path")
    @classmethod
    def check(cls, path):
        raise FormatError(f"sparse_rt: {path} is\ntruncated")


def raised(function):
    try:
        function()
    except Exception as error:
        return error


def wrapped():
    Model(path="a.safetensors")


def chained():
    try:
        raise BackendError("no kernel")
    except BackendError as error:
        raise RuntimeError("worker failed") from error


def test_errors_of_ours_are_found_behind_others(monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    assert failure(raised(wrapped)) == ("sparse_rt: a.safetensors is truncated", 2)
    assert failure(raised(chained)) == ("sparse_rt: no kernel", 1)
    assert failure(RuntimeError("of someone else")) is None
    loop = RuntimeError("first")
    loop.__cause__ = RuntimeError("second")
    loop.__cause__.__cause__ = loop
    assert list(own_errors(loop)) == []


def log(logger, error):
    try:
        raise RuntimeError("worker failed") from error
    except RuntimeError:
        logger.exception("failed to start")


def test_the_first_recorded_error_reaches_the_front_process(tmp_path, monkeypatch):
    file = tmp_path / "failure.json"
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    logger = logging.Logger("vllm")
    logger.addHandler(Recorder(str(file)))
    logger.error("something without an error")
    log(logger, ValueError("not of ours"))
    assert not file.exists() and failure(RuntimeError("engine core failed")) is None
    log(logger, UserError("sparse_rt: down_proj is damaged"))
    log(logger, UserError("sparse_rt: what came later"))
    assert failure(RuntimeError("engine core failed")) == ("sparse_rt: down_proj is damaged", 2)
    file.write_text("half a li")
    assert failure(RuntimeError("engine core failed")) is None


def test_the_sentence_follows_the_traceback(capsys, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    shown = []
    hook = LastWord(lambda *seen: shown.append(seen))
    for error in (raised(chained), RuntimeError("of someone else"), UserError("said by the traceback itself")):
        hook(type(error), error, None)
    assert len(shown) == 3 and capsys.readouterr().err == "sparse_rt: no kernel\n"


FRONT = f"""
import logging, multiprocessing, os
from sparse_rt.errors import FormatError
from sparse_rt.exporters.vllm.failures import watch

def worker():
    watch(), watch()
    try:
        raise FormatError("sparse_rt: down_proj is damaged")
    except FormatError:
        logging.getLogger("vllm").exception("failed to start")

if __name__ == "__main__":
    watch(), watch()
    print(os.environ[{FILE_VARIABLE!r}])
    process = multiprocessing.get_context("spawn").Process(target=worker)
    process.start(), process.join()
    raise RuntimeError("Engine core initialization failed. See root cause above")
"""


def test_a_worker_tells_the_process_that_the_user_started(tmp_path):
    script = tmp_path / "front.py"
    script.write_text(FRONT)
    outer = os.environ | {FILE_VARIABLE: str(tmp_path / "of another server")}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=outer)
    lines = done.stderr.strip().splitlines()
    assert lines[-2:] == [
        "RuntimeError: Engine core initialization failed. See root cause above",
        "sparse_rt: down_proj is damaged",
    ]
    assert lines.count("sparse_rt: down_proj is damaged") == 1 and done.returncode == 1
    (file,) = done.stdout.split()
    assert file != outer[FILE_VARIABLE] and not os.path.exists(file), "nothing is left behind"
