"""convert --permute: the model stays the same function, and N:M takes what matters least."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import file_digest
from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import permute
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load
from sparse_rt.pruning.permutation import Channels, find_channels
from sparse_rt.workflows.convert import convert

# Family -> changes, and its linears whose inputs can be permuted.
FAMILIES = {
    "llama": ({}, ("o_proj", "down_proj")),
    "phi3": (dict(num_key_value_heads=4), ("o_proj", "down_proj")),
    "opt": ({}, ("out_proj", "fc2")),
}
TOKENS = torch.randint(1, 4000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(assets.calibration_text().read_text()[:6000])
    return path


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Models whose permutable linears have four inputs that count and then four that do not, in turn."""

    def build(family):
        folder = tmp_path_factory.mktemp("crowded") / family
        changes, names = FAMILIES[family]
        helpers.tiny_model(folder, family, torch.float32, **changes)
        tensors = load_file(folder / "model.safetensors")
        for key, tensor in tensors.items():
            if key.endswith(tuple(f"{name}.weight" for name in names)):
                tensor[:, torch.arange(tensor.shape[1]) % 8 >= 4] = 0
            if key.endswith("fc1.bias"):
                tensor += 1  # a ReLU that no calibration token opens would not count
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return {family: build(family) for family in FAMILIES}


def run(model, output, text, **options):
    options = {"num_samples": 3, "max_seq_len": 24, "dataset": str(text), "method": "ria", **options}
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def weight_files(folder):
    return {file.name: file_digest(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("method", ["magnitude", "ria"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_2_4_would_lose_is_kept_and_the_function_stays(family, method, crowded, text, tmp_path):
    """The producers stay dense here: their rows, and biases, are written in the new order all the same."""
    names = FAMILIES[family][1]
    options = {"method": method, "ignore": ["lm_head", f"re:(?!.*({'|'.join(names)})$).*"]}
    dense = logits(AutoModelForCausalLM.from_pretrained(crowded[family], dtype="auto"))
    plain = run(crowded[family], tmp_path / "plain", text, **options)
    result = run(crowded[family], tmp_path / "permuted", text, permute=True, **options)
    assert len(result["sparsity"]) == 4 and set(result["permuted"]) == set(result["sparsity"])
    for name, (before, after) in result["permuted"].items():
        assert after == 1 and 0.5 < before < 0.9
        assert result["reconstruction_error"][name] < 1e-6
        assert method == "magnitude" or plain["reconstruction_error"][name] > 0.1
    assert result["options"]["permute"] is True and "permute" not in plain["options"]
    error = {
        name: float((logits(load(tmp_path / name)) - dense).norm() / dense.norm()) for name in ("plain", "permuted")
    }
    assert error["permuted"] < 1e-5 and error["plain"] > 0.03


def test_errors_are_lower_with_every_linear_pruned(text, tmp_path):
    """Inputs of very different size: what a linear loses falls, and what cannot be permuted is as it was in block 0."""
    folder = helpers.tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            sizes = torch.randn(tensor.shape[1] // 4, generator=torch.Generator().manual_seed(1)).exp()
            tensor *= sizes.repeat_interleave(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = run(folder, tmp_path / "plain", text)
    result = run(folder, tmp_path / "permuted", text, permute=True)
    assert sorted(name.rpartition(".")[2] for name in result["permuted"]) == ["down_proj"] * 2 + ["o_proj"] * 2
    for name, (before, after) in result["permuted"].items():
        assert after > before
        assert result["reconstruction_error"][name] < plain["reconstruction_error"][name]
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.0.self_attn.{name}"
        assert result["reconstruction_error"][key] == plain["reconstruction_error"][key]


def test_an_order_that_changes_the_output_is_taken_back(crowded, text, tmp_path, monkeypatch):
    def wrong(*args):
        """Rows that do not belong to the inputs they are said to make."""
        for c in find_channels(*args):
            yield Channels(c.consumer, c.columns, tuple((name, rows.roll(1)) for name, rows in c.rows), c.kinds)

    monkeypatch.setattr(permute, "find_channels", wrong)
    result = run(crowded["opt"], tmp_path / "wrong", text, permute=True)
    assert result["permuted"] == {}
    assert any("--permute left 4 weights as they were" in note for note in result["notes"])
    run(crowded["opt"], tmp_path / "plain", text)
    assert weight_files(tmp_path / "wrong") == weight_files(tmp_path / "plain")


def test_permute_without_a_use_is_refused(crowded, tmp_path):
    model = crowded["llama"]
    with pytest.raises(UserError, match="--permute is for N:M patterns.*the pattern is unstructured"):
        run(model, tmp_path / "out", None, permute=True, pattern="unstructured")
    with pytest.raises(UserError, match="--method none prunes nothing"):
        run(model, tmp_path / "out", None, permute=True, method="none")
    assert not (tmp_path / "out").exists()
