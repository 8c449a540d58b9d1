"""The spellings of vLLM's options that `sparse-rt serve` must see before it sets a default."""

import pytest

from sparse_rt.errors import UserError
from sparse_rt.workflows.serve_arguments import ServeArguments


@pytest.mark.parametrize(
    "args", [["--tensor-parallel-size", "2"], ["--tensor_parallel_size=2"], ["-tp", "2"], ["-tp=2"]]
)
def test_every_spelling_of_an_option(args):
    found = ServeArguments(["--enforce-eager", *args, "--max-model-len", "64", "--port=1"])
    assert found["--tensor-parallel-size"] == "2" and found["--port"] == "1" and found.ranks() == 2


def test_what_is_not_said_is_none():
    found = ServeArguments(["--hosts-file", "x", "--limit-mm-per-prompt.image", "1", "-O3"])
    assert found["--host"] is None and not found.any_of("--host", "--uds")
    assert found.ranks() == 1 and found.placed_by_user() is None


def test_ranks_multiply_and_local_replicas_count_alone():
    sizes = ["-dp", "4", "-pp", "3", "-tp", "2"]
    assert ServeArguments(sizes).ranks() == 24
    assert ServeArguments([*sizes, "--data-parallel-size-local", "2"]).ranks() == 12


@pytest.mark.parametrize("args", [["--enable-expert-parallel"], ["--enable_expert_parallel"], ["-ep"]])
def test_experts_that_are_shared_out_whole(args):
    assert ServeArguments(["-tp", "2", *args, "--port", "1"]).expert_parallel
    assert not ServeArguments(["-tp", "2", "--no-enable-expert-parallel"]).expert_parallel


@pytest.mark.parametrize("args", [["--nnodes", "2"], ["-dpn", "1"], ["--numa-bind"], ["--data_parallel_hybrid_lb"]])
def test_workers_that_the_user_places(args):
    assert ServeArguments([*args, "--port", "1"]).placed_by_user() is not None


def test_the_command_line_wins_over_the_config_file(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 1\nhost: 0.0.0.0\nnuma-bind: false\ncompilation-config:\n  mode: 3\n")
    found = ServeArguments(["--config", str(file), "--port", "2"])
    assert found["--port"] == "2" and found["--host"] == "0.0.0.0" and found.placed_by_user() is None


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "just words"])
def test_a_config_file_that_cannot_be_read(tmp_path, text):
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"--config {file}"):
        ServeArguments(["--config", str(file)])


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(UserError, match="--config .*gone.yaml cannot be read"):
        ServeArguments(["--config", str(tmp_path / "gone.yaml")])
    with pytest.raises(UserError, match="vLLM's arguments: argument --port: expected one argument"):
        ServeArguments(["--port"])
    with pytest.raises(UserError, match="--data-parallel-size 0: give a whole number from 1 on"):
        ServeArguments(["-dp", "0"]).ranks()
