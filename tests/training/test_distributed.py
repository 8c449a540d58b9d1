"""Several processes train what one process trains: DDP and FSDP2 over gloo, with real process groups."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import helpers
from sparse_rt.adapters.registry import adapter_names
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.hf.load import load
from sparse_rt.workflows.finetune import finetune

pytestmark = pytest.mark.slow
FSDP2 = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
# The adapters without an optimizer or callbacks of their own.
SHARDED = ("spp", "masklora", "values", "dcft")
WEIGHTS = "adapter_model.safetensors"
HALF = {"per_device_train_batch_size": 2}


def losses(result, name="losses"):
    return torch.tensor([loss for _, loss in result[name]])


def assert_same_training(whole, ranks):
    """One process and two processes with half of the batch each: the same losses, and one adapter in all ranks."""
    for name in ("losses", "eval_losses"):
        torch.testing.assert_close(losses(ranks[0]["result"], name), losses(whole, name), rtol=1e-5, atol=1e-5)
    assert ranks[0]["result"]["tokens"] == whole["tokens"] and ranks[0]["result"]["processes"] == 2
    first, second = (seen["adapter"] for seen in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """What one process makes of the whole batch, by adapter."""
    found = {}

    def run(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(f"one-{name}")
            found[name] = finetune(helpers.short_run(base, rows, folder / "adapter", adapter=name, eval_fraction=0.2))
        return found[name]

    return run


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_ddp_trains_what_one_process_trains(options, launch, whole, tmp_path):
    names = adapter_names()
    ranks = launch({name: options(name, HALF, name, eval_fraction=0.2) for name in names})
    for name in names:
        one = whole(name)
        assert_same_training(one, ranks[name])
        assert files(tmp_path / name) == files(Path(one["output_dir"])), "one writer, one folder"


def test_fsdp2_trains_what_one_process_trains(options, base, launch, whole, tmp_path):
    """Values and metadata are split and come back bit for bit; the adapter is written whole."""
    names = adapter_names()
    runs = {name: options(name, {**HALF, **FSDP2}, name, eval_fraction=0.2) for name in names}
    runs["fsdp1"] = options("fsdp1", {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}})
    ranks = launch(runs, shard_on_cpus=True)
    assert "FSDP1 flattens the parameters" in ranks.pop("fsdp1")[1]["error"]
    checkpoint = Checkpoint.open(base)
    expected = {name: checkpoint.load(name) for name in checkpoint.compressed_tensors()}
    for name, seen in ranks.items():
        if name not in SHARDED:
            assert name in seen[0]["error"].lower() and "FSDP" in seen[0]["error"] and "DDP" in seen[0]["error"]
            continue
        assert_same_training(whole(name), seen)
        for rank in seen:
            assert rank["base"].keys() == expected.keys() and rank["sharded"] >= len(expected)
            assert all(same(rank["base"][key], expected[key]) for key in expected)
            assert rank["local"] <= 0.51 * sum(tensor.nbytes for tensor in expected.values()), "half of every tensor"
        one, two = (load_file(folder / WEIGHTS) for folder in (Path(whole(name)["output_dir"]), tmp_path / name))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
        PeftModel.from_pretrained(load(base), tmp_path / name)


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


RESUME = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **HALF}
# Random numbers at every step: those of each process must come back, too.
DROPOUT = {"adapter_options": {"dropout": 0.1}}


def test_kill_9_of_a_process_and_resume_is_the_same_to_the_bit_under_ddp(options, launch, tmp_path):
    runs = {"whole": options("whole", RESUME, **DROPOUT), "out": options("out", RESUME, **DROPOUT)}
    launch(runs, stop={"out": {"steps": 5, "kill": True}})
    assert not (tmp_path / "out").exists()
    ranks = launch({"again": options("out", RESUME, resume=True, **DROPOUT)})
    assert ranks["again"][0]["result"]["resumed_from"] == "checkpoint-4"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_an_interrupted_run_resumes_to_the_bit_under_fsdp2(options, launch, tmp_path):
    trainer = {**RESUME, **FSDP2}
    runs = {"whole": options("whole", trainer, **DROPOUT), "out": options("out", trainer, **DROPOUT)}
    runs["again"] = options("out", trainer, resume=True, **DROPOUT)
    ranks = launch(runs, stop={"out": {"steps": 5}}, shard_on_cpus=True)
    assert ranks["out"][0]["error"] == "after 5 steps"
    assert ranks["again"][0]["result"]["resumed_from"] == "checkpoint-4"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_accelerate_launch(options, tmp_path):
    """The command of the documentation."""
    given = options("out", {**HALF, "max_steps": 2})
    flags = ["--dataset", given.dataset, "--max-steps", "2", "--save-strategy", "no", "--quiet", "-o", "out"]
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launcher, "-m", "sparse_rt", "finetune", given.model, *flags]
    done = helpers.run_processes(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["processes"] == 2
