"""``finetune``: it learns, it resumes to the bit, it leaves nothing half written."""

import json

import pytest
import torch
import yaml
from peft import PeftModel

import helpers
from sparse_rt.adapters.registry import adapter_names
from sparse_rt.config import FinetuneOptions, read_yaml
from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.hf.load import load
from sparse_rt.progress import Progress
from sparse_rt.workflows.finetune import finetune

TRAINER = {"max_steps": 9, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 0.01}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json", "run.yaml"]
FILES += ["trainer_state.json"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return helpers.compress_folder(helpers.tiny_llama(folder / "dense"), folder / "base", "2:4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(40)))
    return path


@pytest.fixture
def options(base, rows, tmp_path):
    def make(output="out", trainer=(), **changes):
        fields = dict(model=str(base), output_dir=tmp_path / output, dataset=str(rows), max_seq_len=32)
        return FinetuneOptions.build(**{**fields, "trainer": {**TRAINER, **dict(trainer)}, **changes})

    return make


class Interrupt(Progress):
    """Stops the run in the middle of a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def track(self, items, description, total=None):
        for done, item in enumerate(items):
            if done == self.step:
                raise KeyboardInterrupt
            yield item


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("adapter, loss", [("spp", 0.3), ("masklora", 0.3), ("values", 0.3), ("seft", 0.3)])
def test_the_loss_falls_and_the_folder_is_whole(options, tmp_path, adapter, loss):
    rate = {"spp": 0.1, "masklora": 0.02, "values": 0.005, "seft": 0.02}[adapter]
    trainer = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": rate, "save_strategy": "no"}
    result = finetune(options(adapter=adapter, trainer=trainer))
    assert result["last_loss"] < result["first_loss"] - loss
    assert result["steps"] == 40 and len(result["losses"]) == 40 and result["rows"] == 40
    assert result["tokens"] > 40 * 8 and result["seconds"] > 0 and result["peak_memory_bytes"] > 1 << 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no working folder, no lock"
    json.dumps(result)


def test_the_adapter_is_the_one_that_was_trained(options, base, tmp_path):
    result = finetune(options())
    model = PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    trained = {name: p for name, p in model.named_parameters() if ".spp_" in name}
    assert sum(p.numel() for p in trained.values()) == result["trainable_parameters"]
    assert all(p.any() for name, p in trained.items() if ".spp_B." in name)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["base_digest"] == result["base_digest"]
    assert config["target_modules"] == sorted(config["target_modules"]) and "q_proj" in config["target_modules"]


def test_the_run_file_repeats_the_run(options, tmp_path):
    finetune(options(adapter_options={"groups": 8}, trainer={"max_steps": 3}))
    told = read_yaml(tmp_path / "out" / "run.yaml")
    assert told["trainer"]["learning_rate"] == 0.01 and told["adapter_options"] == {"groups": 8}
    finetune(FinetuneOptions.build(**{**told, "output_dir": tmp_path / "again"}))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")


# An evolution after step 5; checkpoint-6 lies in the window that ends the run, checkpoint-3 in the one before.
SEFT = {"mode": "nm_swap", "interval": 5, "window": 4, "drop_rate": 0.5}


@pytest.mark.parametrize("adapter", ["spp", "masklora", "values", "seft"])
def test_resume_equals_an_uninterrupted_run_to_the_bit(options, tmp_path, adapter):
    # Dropout draws random numbers at every step: resuming must restore the generator, too.
    fields = dict(adapter=adapter, adapter_options={"dropout": 0.1, **(SEFT if adapter == "seft" else {})})
    whole = finetune(options("whole", **fields))
    with pytest.raises(KeyboardInterrupt):
        finetune(options("out", **fields), Interrupt(7))
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.training" / "checkpoint-6").is_dir()
    resumed = finetune(options("out", resume=True, **fields))
    assert resumed["resumed_from"] == "checkpoint-6"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    assert resumed["losses"] == whole["losses"] and resumed["tokens"] < whole["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_seft_resumes_to_the_bit_before_its_mask_moves(options, tmp_path):
    """Interrupted in the window whose gradients decide, and in the middle of a step of two micro-batches."""
    fields = dict(adapter="seft", adapter_options=SEFT)
    trainer = {"gradient_accumulation_steps": 2, "max_steps": 8}
    finetune(options("whole", trainer=trainer, **fields))
    with pytest.raises(KeyboardInterrupt):
        finetune(options("out", trainer=trainer, **fields), Interrupt(4))
    assert finetune(options("out", resume=True, trainer=trainer, **fields))["resumed_from"] == "checkpoint-3"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", adapter_names())
def test_kill_9_leaves_no_half_adapter_and_resumes_to_the_bit(options, tmp_path, adapter):
    helpers.run_until_killed("finetune", options("out", adapter=adapter), after=5, cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"checkpoint-3; pass --resume to go on from it, or --overwrite"):
        finetune(options("out", adapter=adapter))
    resumed = finetune(options("out", resume=True, adapter=adapter))
    finetune(options("whole", adapter=adapter))
    assert resumed["resumed_from"] == "checkpoint-3"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(options, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        finetune(options(), Interrupt(7))
    last = tmp_path / ".out.training" / "checkpoint-6"
    (last / "complete").unlink()
    (last / "trainer_state.json").write_text("{")
    assert finetune(options(resume=True))["resumed_from"] == "checkpoint-3"


def test_another_run_is_not_resumed(options, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        finetune(options(), Interrupt(4))
    with pytest.raises(UserError, match="other values of seed, training option learning_rate"):
        finetune(options(resume=True, seed=1, trainer={"learning_rate": 0.02}))
    assert finetune(options(resume=True))["resumed_from"] == "checkpoint-3"


def test_resume_without_anything_to_resume_starts_from_the_beginning(options):
    assert finetune(options(resume=True, trainer={"max_steps": 2}))["resumed_from"] is None


def test_a_diverged_run_stops_and_publishes_nothing(options, tmp_path):
    with pytest.raises(SparseRTError, match="lower learning_rate"):
        finetune(options(adapter="masklora", trainer={"learning_rate": 1e30, "warmup_steps": 0}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter": "lora"}, "Unknown adapter 'lora'; known are .*spp"),
        ({"adapter_options": {"group": 4}}, "option of the adapter spp: 'group'; nearest known are groups"),
        ({"adapter_options": {"groups": "many"}}, "groups is a number, got 'many'"),
        ({"adapter_options": {"groups": 7}}, "cut into 7 equal groups"),
        ({"adapter_options": {"target_modules": ["lm_head"]}}, "lm_head is a Linear"),
        ({"trainer": {"lerning_rate": 1}}, "'lerning_rate'; nearest known are learning_rate"),
        ({"trainer": {"learning_rate": "fast"}}, "learning_rate is a number, got 'fast'"),
        ({"trainer": {"max_steps": 2.5}}, "max_steps is a whole number"),
        ({"trainer": {"seed": 3}}, "'seed' is set with --seed"),
        ({"trainer": {"lr_scheduler_type": "zigzag"}}, "zigzag"),
        ({"trainer": {"eval_strategy": "steps"}}, "eval"),
        ({"dataset": "./missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_bad_options_are_refused_before_training(options, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        finetune(options(**changes))
    assert not (tmp_path / "out").exists()


def test_text_numbers_from_yaml_are_numbers(options):
    assert yaml.safe_load("lr: 1e-2")["lr"] == "1e-2"
    assert finetune(options(trainer={"learning_rate": "1e-2", "max_steps": 1}))["steps"] == 1


def test_a_dense_model_is_refused(options, dense_llama):
    with pytest.raises(UserError, match="sparse-rt convert"):
        finetune(options(model=str(dense_llama)))


def test_an_existing_output_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        finetune(options())


def test_modules_to_save_are_trained_and_saved(options, base, tmp_path):
    finetune(options(adapter_options={"modules_to_save": ["norm"]}, trainer={"max_steps": 2}))
    model = PeftModel.from_pretrained(load(base), tmp_path / "out")
    assert not torch.equal(
        model.base_model.model.model.norm.modules_to_save["default"].weight, load(base).model.norm.weight
    )
