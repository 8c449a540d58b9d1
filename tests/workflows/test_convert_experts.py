"""Mixtures of experts: every expert is pruned by its own inputs, reported, and loaded compressed."""

import json

import pytest
import torch
import transformers
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.config import ConvertOptions, MergeOptions
from sparse_rt.data import read_texts, token_windows
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.nn import sparse_linears
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.finetune import finetune
from sparse_rt.workflows.merge import merge

PARTS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
BLOCK = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
SAMPLES, LENGTH = 3, 40


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    return {family: helpers.tiny_model(folder / family, family, dtype=torch.float32) for family in PARTS}


def run(model, output, text, **options):
    options = {"num_samples": SAMPLES, "max_seq_len": LENGTH, "dataset": text, **options}
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **options))


class Products(TorchFunctionMode):
    """Sums of squares, float64, of the columns of what every weight is multiplied with, by where it is stored."""

    def __init__(self):
        super().__init__()
        self.sums = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear:
            x, place = args[0].double().flatten(0, -2), args[1].data_ptr()
            self.sums[place] = self.sums.get(place, 0) + x.square().sum(0)
        return function(*args, **(kwargs or {}))


def two_of_four(scores):
    """bool [m, n]: the two highest of every four columns, the first of equal ones."""
    m, n = scores.shape
    order = scores.view(m, n // 4, 4).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros(m, n // 4, 4, dtype=torch.bool).scatter_(-1, order[..., :2], True).view(m, n)


@torch.no_grad()
def wanda_of_the_whole_model(folder, text):
    """transformers' own model with its fused experts, pruned in place block by block; nothing of ours runs in it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    tokens = token_windows(read_texts(text), load_tokenizer(folder), LENGTH, SAMPLES, 0)
    for block in model.model.layers:
        with Products() as products:
            for sequence in tokens:
                model(sequence[None], use_cache=False)
        experts = block.mlp.experts
        matrices = [part.weight for part in block.self_attn.modules() if isinstance(part, torch.nn.Linear)]
        for weight in (*matrices, *experts.gate_up_proj, *experts.down_proj):
            norms = products.sums.get(weight.data_ptr(), torch.ones(weight.shape[1], dtype=torch.float64)).sqrt()
            weight *= two_of_four(weight.double().abs() * norms)
    return model


@pytest.mark.parametrize("family", PARTS)
def test_experts_are_pruned_by_their_own_inputs(mixtures, family, text, tmp_path):
    result = run(mixtures[family], tmp_path / "out", text, method="wanda")
    expected, model = wanda_of_the_whole_model(mixtures[family], text), load(tmp_path / "out")
    for index, block in enumerate(expected.model.layers):
        experts = model.model.layers[index].mlp.experts
        gate, up, down = PARTS[family]
        for expert in range(experts.num_experts):
            rows = [experts.get_submodule(f"{expert}.{part}").decompress() for part in (gate, up)]
            assert torch.equal(torch.cat(rows), block.mlp.experts.gate_up_proj[expert])
            assert torch.equal(
                experts.get_submodule(f"{expert}.{down}").decompress(), block.mlp.experts.down_proj[expert]
            )
        router = block.mlp.gate.weight
        assert torch.equal(model.model.layers[index].mlp.gate.weight, router)
    ids = torch.arange(1, 25).view(2, 12) * 31
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)
    name = f"model.layers.1.{BLOCK[family]}.experts.0.{PARTS[family][2]}"
    assert 0 < result["reconstruction_error"][name] < 1
    reasons = {entry["name"]: entry["reason"] for entry in result["skipped"]}
    assert "TopKRouter, which is not an nn.Linear" in reasons[f"model.layers.0.{BLOCK[family]}.gate"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude_and_named(mixtures, method, text, tmp_path):
    options = dict(method=method, pattern="unstructured", sparsity=0.75, num_samples=1, max_seq_len=1)
    result = run(mixtures["mixtral"], tmp_path / "out", text, **options)
    unseen = result["unseen_experts"]
    assert len(unseen) == 2 * 2 * 3  # two blocks, and the token has two of the four experts of each
    assert any(note.startswith("12 weights of experts were pruned by magnitude") for note in result["notes"])
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    assert manifest["unseen_experts"] == unseen and not set(unseen) & result["reconstruction_error"].keys()
    source, model = SourceCheckpoint.open(mixtures["mixtral"]), load(tmp_path / "out")
    for name, module in sparse_linears(model):
        assert torch.isfinite(module.values).all()
        key = name.replace(".mlp.", ".block_sparse_moe.")
        if key not in unseen:
            continue
        weight, mask = source.load(f"{key}.weight"), module.mask()
        assert torch.equal(module.decompress(), torch.where(mask, weight, 0.0))
        lowest, dropped = weight.abs().masked_fill(~mask, torch.inf), weight.abs().masked_fill(mask, 0)
        dims = -1 if method == "wanda" else (-2, -1)  # of every row, or of the matrix
        assert (lowest.amin(dims) >= dropped.amax(dims)).all()
    assert result["mean_sparsity"] == 0.75


def test_experts_are_wrapped_too(mixtures, tmp_path, text):
    run(mixtures["mixtral"], tmp_path / "out", text, method="armor", num_samples=1, max_seq_len=1)
    model, source = load(tmp_path / "out"), SourceCheckpoint.open(mixtures["mixtral"])
    experts = model.model.layers[0].mlp.experts
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1"
        layer, weight = experts.get_submodule(f"{expert}.w1"), source.load(f"{name}.weight")
        assert layer.wrapper is not None
        same = torch.equal(layer.decompress(), torch.where(layer.mask(), weight, 0.0))
        assert same == (name in manifest["unseen_experts"])


def test_experts_can_stay_dense(mixtures, tmp_path, text):
    result = run(mixtures["mixtral"], tmp_path / "none", text, ignore=["lm_head", "re:.*experts.*"])
    assert len(Checkpoint.open(tmp_path / "none").weights) == 8 and result["coverage_percent"] < 15
    model = load(tmp_path / "none")
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 320, 64)  # as transformers has them
    some = ["lm_head", "re:.*layers.0.*experts.[13].*"]
    run(mixtures["mixtral"], tmp_path / "some", text, ignore=some)
    model, source = load(tmp_path / "some"), SourceCheckpoint.open(mixtures["mixtral"])
    experts = model.model.layers[0].mlp.experts
    stored = source.load("model.layers.0.block_sparse_moe.experts.1.w1.weight")
    assert torch.equal(experts.get_submodule("1.w1").weight, stored)
    assert experts.get_submodule("2.w1").pattern == "2:4"


def test_dequantized_experts_are_saved_as_the_family_saves_them(mixtures, tmp_path, text):
    run(mixtures["mixtral"], tmp_path / "out", text)
    model = load(tmp_path / "out", dequantize=True)
    model.save_pretrained(tmp_path / "dense")
    assert (
        SourceCheckpoint.open(tmp_path / "dense").tensors.keys()
        == SourceCheckpoint.open(mixtures["mixtral"]).tensors.keys()
    )
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "dense")(ids).logits, load(tmp_path / "out")(ids).logits, atol=1e-4)


def test_blocks_with_experts_are_reconstructed(mixtures, tmp_path, text):
    result = run(mixtures["qwen3_moe"], tmp_path / "out", text, method="wanda", reconstruct=8)
    assert result["mean_block_error_after"] < 0.9 * result["mean_block_error_before"]


def test_int8_values_of_experts(mixtures, tmp_path, text):
    run(mixtures["mixtral"], tmp_path / "out", text)
    (tmp_path / "int8").mkdir()
    Int8Exporter().export(tmp_path / "out", tmp_path / "int8")
    name = "model.layers.0.block_sparse_moe.experts.3.w2"
    widened = Checkpoint.open(tmp_path / "int8").load_weight(name)[0]
    layer = load(tmp_path / "int8").model.layers[0].mlp.experts.get_submodule("3.w2")
    assert torch.equal(layer.values, widened)


def test_an_adapter_of_the_experts_is_trained_and_merged(mixtures, tmp_path, text):
    """Mixtral calls a module otherwise in memory than in its files."""
    run(mixtures["mixtral"], tmp_path / "out", text)
    finetune(
        helpers.short_run(tmp_path / "out", assets.finetune_jsonl(), tmp_path / "adapter", {"learning_rate": 0.05})
    )
    options = dict(model=str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "merged")
    result = merge(MergeOptions.build(**options))
    assert result["merged_weights"] == 2 * (4 + 4 * 3) and result["mask"] == "identical"
    assert result["logits_error"] < 1e-4 < result["adapter_effect"]
