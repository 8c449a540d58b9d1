"""The configurations in examples/ run as they are, and say what they claim."""

import json
from pathlib import Path

import pytest

from sparse_rt.tools.cli import main
from sparse_rt.workflows.finetune_options import finetune_options

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "spp_alpaca.yaml"


def test_the_recipe_of_spp_is_the_published_one():
    options = finetune_options({"model": "m", "output_dir": "o"}, RECIPE)
    assert options.adapter == "spp" and options.max_seq_len == 512 and not options.completion_only
    assert options.adapter_options == {"groups": 16, "scale": 2.0, "dropout": 0.05}
    trainer = options.trainer
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 128
    assert (trainer["learning_rate"], trainer["weight_decay"], trainer["num_train_epochs"]) == (4e-3, 0.001, 3)
    assert (trainer["warmup_steps"], trainer["lr_scheduler_type"]) == (0.03, "linear")


def test_the_recipe_of_spp_runs(base, tmp_path):
    rows = [{"instruction": f"Add {i}", "input": "1" * (i % 2), "output": f"x = {i}"} for i in range(256)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = ["finetune", str(base), "--config", str(RECIPE), "-o", str(tmp_path / "out"), "--quiet"]
    with pytest.raises(SystemExit) as done:
        main([*where, "--dataset", str(tmp_path / "alpaca.jsonl"), "--max-steps", "2"])
    assert not done.value.code
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["rows"] == 256 and metrics["tokens"] > 2 * 128 * 10
