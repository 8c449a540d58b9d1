"""The command line as a user meets it: exit codes, one-sentence errors, JSON, and help that answers at once."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from sparse_rt.tools.cli import COMMANDS, main


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of the command run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    code, out, _ = call(capsys, name, "--help")
    assert code == 0 and out.startswith("Usage: ")
    if name != "serve":
        assert "--json" in out


def test_help_answers_in_half_a_second():
    """A generous bound for a loaded machine; the import test in test_architecture is the strict one."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sparse_rt", "--help"], check=True, capture_output=True, cwd="/")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["eval"], "Missing argument 'MODEL'"),
        (["eval", "{dense}", "--max-seq-len", "1"], "option max_seq_len"),
        (["eval", "{dense}", "--max-seq-len", "many"], "not a valid integer"),
        (["eval", "{dense}", "--colour", "red"], "No such option"),
        (["eval", "{tmp}/nothing"], "neither a local folder nor a reachable hub model"),
        (["eval", "{dense}", "--dataset", "{tmp}/missing.txt"], "missing.txt"),
        (["eval", "{dense}", "--json", "{tmp}/no/folder.json"], "does not exist"),
        (["eval", "{dense}", "--device", "abacus"], "'abacus' is not known; allowed are auto, cpu, cuda"),
        (["generate", "{dense}"], "Missing option '--prompt'"),
        (["convert", "{dense}", "-o", "{tmp}/out", "--pattern", "3:2"], "need 0 < N < M"),
        (["convert", "{dense}", "-o", "{tmp}/out", "--method", "guess"], "guess"),
        (["convert", "{dense}", "-o", "{tmp}/out", "--sparsity", "1.5"], "0.5 removes half"),
        (["convert", "{dense}", "-o", "{full}"], "not empty"),
        (["finetune", "{dense}", "-o", "{tmp}/out"], "sparse-rt convert"),
        (["export", "{dense}", "--to", "onnx", "-o", "{tmp}/out"], "sparse-rt convert"),
        (["export", "{sparse}", "--to", "tensorflow", "-o", "{tmp}/out"], "known are"),
        (["merge", "{sparse}", "{tmp}/nothing", "-o", "{tmp}/out"], "nothing"),
        (["verify", "{dense}"], "sparse_rt"),
        (["bench", "{dense}"], "sparse-rt convert"),
        (["serve", "{tmp}/nothing"], "neither a local folder"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(capsys, dense_llama, sparse_llama, tmp_path, arguments, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    places = {"dense": dense_llama, "sparse": sparse_llama, "tmp": tmp_path, "full": full}
    code, out, err = call(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2, err
    assert message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()


def test_json_on_standard_output_is_the_only_thing_there(capsys, sparse_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 200)
    arguments = ("eval", sparse_llama, "--dataset", text, "--max-seq-len", 64, "--max-samples", 3, "--json", "-")
    code, out, _ = call(capsys, *arguments)
    result = json.loads(out)
    assert code == 0 and result["context_length"] == 64 and result["windows"] == 3 and result["tokens"] == 3 * 63
    command = [sys.executable, "-m", "sparse_rt", *arguments[:-1], tmp_path / "r.json", "--quiet"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert json.loads((tmp_path / "r.json").read_text())["perplexity"] == result["perplexity"]


def test_damaged_model_is_refused_by_name_with_exit_code_2(capsys, sparse_llama, tmp_path):
    folder = shutil.copytree(sparse_llama, tmp_path / "model")
    shard = next(folder.glob("sparse_rt-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    code, _, err = call(capsys, "generate", folder, "--prompt", "x")
    assert code == 2 and "truncated: tensor " in err and "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_rt", "eval", str(tmp_path / "nothing"), "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "Traceback" in done.stderr and "UserError" in done.stderr


def test_env_says_which_gpu_kernels_are_used_and_how_to_change_it(capsys, monkeypatch):
    monkeypatch.delenv("SPARSE_RT_GPU_KERNELS", raising=False)
    found = {}
    for setting in ("", "all"):
        monkeypatch.setenv("SPARSE_RT_GPU_KERNELS", setting)
        _, out, _ = call(capsys, "env", "--json", "-")
        found[setting] = json.loads(out)["gpu_dispatch"]
    default = found[""]
    if default["measured"] is None:
        assert "not measured: every product forms the dense weight once" in default["rule"]
        assert "benchmarks/gpu_suite.py --output" in default["rule"]
        assert {row["used_for"] for row in default["kernels"]} == {"never"}
    rows = {(row["kernel"], row["pattern"]): row["used_for"] for row in found["all"]["kernels"]}
    assert "never" not in rows.values() and ("cslt", "unstructured") not in rows
    assert default["cusparselt"], "available, or why not"
    from sparse_rt.tools import env

    env.show_gpus({"gpus": ["GPU X"], "gpu_dispatch": found["all"]})
    shown = capsys.readouterr().out
    assert "d4" in shown and "1 to 8 tokens" in shown and "SPARSE_RT_GPU_KERNELS" in shown


def test_env_names_the_backend_and_the_reasons(capsys, monkeypatch):
    monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    code, out, _ = call(capsys, "env", "--json", "-")
    result = json.loads(out)
    assert code == 0 and result["plugin_visible_to_vllm"] and result["packages"]["torch"]
    chosen = {(row["op"].startswith("packed_"), row["backend"]) for row in result["backends"]}
    assert chosen == {(False, "reference"), (True, None)}  # the reference has no layout of its own
    assert {row["layout"] for row in result["layouts"]} == {None}
    refused = {row["op"]: row["refused"].get("native") for row in result["backends"]}
    assert refused.pop("experts") is None  # served experts are packed; on canonical tensors there is the reference
    assert set(refused.values()) == {"SPARSE_RT_BACKEND=reference"}
    monkeypatch.setenv("SPARSE_RT_BACKEND", "quantum")
    code, _, err = call(capsys, "env")
    assert code == 2 and "known are native, reference" in err
