"""Calibration data of `convert`: every form of text that the product takes, and what the model itself writes."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, file_digest, partial_path
from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import selfgen
from sparse_rt.data.selfgen import sample_windows
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner
from sparse_rt.workflows.convert import convert

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def text():
    return assets.calibration_text().read_text()[:4000]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = helpers.tiny_llama(tmp_path_factory.mktemp("dataset") / "model", num_hidden_layers=4)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def options(model, output, **more):
    fields = dict(method="wanda", num_samples=3, max_seq_len=24, max_shard_size="60kB")
    return ConvertOptions.build(model=str(model), output_dir=output, **{**fields, **more})


def tensors(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.load_weight(name) for name in checkpoint.weights}


ROWS = {
    "text": lambda text: {"text": text},
    "messages": lambda text: {"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": text}]},
    "sharegpt": lambda text: {"conversations": [{"from": "human", "value": "Go"}, {"from": "gpt", "value": text}]},
    "alpaca": lambda text: {"instruction": "Go", "input": "", "output": text},
    "completion": lambda text: {"prompt": "Go", "completion": text},
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_of_rows_calibrates(model, text, tmp_path, shape):
    rows = [ROWS[shape](text[start : start + 1000]) for start in range(0, 3000, 1000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = convert(options(model, tmp_path / "out", dataset=str(tmp_path / "rows.jsonl")))
    assert 0 < result["mean_reconstruction_error"] < 1 and result["options"]["num_samples"] == 3


def test_a_file_a_folder_and_a_hub_name_with_the_same_rows_give_the_same_model(model, text, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(json.dumps({"text": text}))
    load, asked = datasets.load_dataset, []

    def from_hub(name, *arguments, **more):
        if name != "someone/texts":
            return load(name, *arguments, **more)
        asked.append((*arguments, more["split"]))
        return datasets.Dataset.from_dict({"text": [text]})

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    found = []
    for number, source in enumerate((tmp_path / "text.txt", tmp_path / "folder", "someone/texts:small:test")):
        convert(options(model, tmp_path / str(number), dataset=str(source)))
        found.append(tensors(tmp_path / str(number)))
    assert asked == [("small", "test")]
    for name, pair in found[0].items():
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(pair, other[name], strict=True))


def test_self_calibrates_on_what_the_dense_model_writes(model, tmp_path):
    (tmp_path / "mute").mkdir()
    for file in model.iterdir():
        if "tokenizer" not in file.name:  # nothing is read, so none is needed
            (tmp_path / "mute" / file.name).symlink_to(file)
    chosen = options(tmp_path / "mute", tmp_path / "out", dataset="self", self_temperature=0.7, seed=5)
    result = convert(chosen)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    windows = sample_windows(dense, 24, 3, 0.7, 5)
    linear = dense.get_submodule("model.layers.0.mlp.gate_proj")  # of the first block: nothing before it is pruned
    stats = ActivationStats(linear.in_features)
    hook = linear.register_forward_pre_hook(lambda module, args: stats.add(args[0]))
    with torch.no_grad():
        for sequence in windows:
            dense(sequence.unsqueeze(0), use_cache=False)
    hook.remove()
    checkpoint = Checkpoint.open(tmp_path / "out")
    entry = checkpoint.weights["model.layers.0.mlp.gate_proj"]
    fmt = get_format(entry.pattern)
    _, mask = get_pruner("wanda").prune(linear.weight, stats, fmt, None)
    metadata = checkpoint.load_weight("model.layers.0.mlp.gate_proj")[1]
    assert torch.equal(fmt.unpack_mask(metadata, entry.m, entry.n), mask)
    assert result["options"]["dataset"] == "self" and result["options"]["self_temperature"] == 0.7
    assert "from the model's own samples (temperature 0.7)" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob(".*"))
    planned = convert(options(model, tmp_path / "dry", dataset="self", dry_run=True))
    assert any("--dataset self first runs the dense model as a whole" in note for note in planned["notes"])


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    from sparse_rt.config import ConvertOptions
    from sparse_rt.progress import Progress
    from sparse_rt.workflows.convert import convert

    class Kill(Progress):
        def track(self, items, description, total=None):
            for number, item in enumerate(items):
                if number == 3 and description.startswith("wanda"):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    convert(ConvertOptions.model_validate_json(sys.argv[1]), Kill())
    """
)


def test_killed_and_resumed_samples_nothing_again_and_equals_uninterrupted(model, tmp_path, monkeypatch):
    chosen = options(model, tmp_path / "out", dataset="self").model_dump_json(exclude_unset=True)
    run = subprocess.run([sys.executable, "-c", SCRIPT, chosen], capture_output=True, text=True, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert list(partial_path(tmp_path / "out").glob("part-*.safetensors"))
    convert(options(model, tmp_path / "straight", dataset="self"))

    def never(*arguments):
        raise AssertionError("sampled again")

    monkeypatch.setattr(selfgen, "sample_windows", never)
    for more in ({"seed": 1}, {"self_temperature": 0.9}, {"num_samples": 4}):
        with pytest.raises(UserError, match="cannot resume: the unfinished conversion calibrated on other samples"):
            convert(options(model, tmp_path / "out", dataset="self", resume=True, **more))
    convert(options(model, tmp_path / "out", dataset="self", resume=True))
    found = [{f.name: file_digest(f) for f in (tmp_path / name).iterdir()} for name in ("out", "straight")]
    assert found[0] == found[1] and not partial_path(tmp_path / "out").exists()


def test_self_is_refused_where_it_cannot_work(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--self-temperature is an option of --dataset self"):
        convert(options(model, tmp_path / "out", self_temperature=0.5))
    monkeypatch.setattr(selfgen, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"the dense model as a whole, which takes .* and .* are free on cpu; give"):
        convert(options(model, tmp_path / "out", dataset="self"))
    monkeypatch.undo()

    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(selfgen, "sample_windows", broken)
    with pytest.raises(RuntimeError):
        convert(options(model, tmp_path / "out", dataset="self"))
    assert list(tmp_path.iterdir()) == []
