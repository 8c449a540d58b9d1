"""Every model family down the whole road: convert, load, compare with the dense model, generate, save again, export."""

import pytest
import torch
import transformers

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ConvertOptions, VerifyOptions
from sparse_rt.exporters.dense import DenseExporter
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.verify import verify

CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
# family: what loads it, compressed weights a block, blocks, linear weights that stay dense.
FAMILIES = {
    "llama": (CAUSAL, 7, 2, ["lm_head"]),
    "llama3": (CAUSAL, 7, 2, ["lm_head"]),
    "mistral": (CAUSAL, 7, 2, ["lm_head"]),
    "qwen2": (CAUSAL, 7, 2, []),
    "qwen3": (CAUSAL, 7, 2, []),
    "gemma2": (CAUSAL, 7, 2, []),
    "gemma3": (CAUSAL, 7, 6, []),
    "phi3": (CAUSAL, 4, 2, ["lm_head"]),
    "opt": (CAUSAL, 6, 2, []),
    "gpt_neox": (CAUSAL, 4, 2, ["embed_out"]),
    "mixtral": (CAUSAL, 4 + 4 * 3, 2, ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]),
    "qwen3_moe": (CAUSAL, 4 + 8 * 3, 2, ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(2))]),
    "phimoe": (CAUSAL, 4 + 4 * 3, 2, ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]),
    "bert": (MASKED, 6, 2, ["cls.predictions.transform.dense"]),
    "roberta": (MASKED, 6, 2, ["lm_head.dense"]),
    "distilbert": (MASKED, 6, 2, ["vocab_transform"]),
    "deberta": (MASKED, 6, 2, ["cls.predictions.transform.dense"]),
    "modernbert": (MASKED, 4, 2, ["head.dense"]),
}
METHODS = {"magnitude": {}, "wanda": dict(pattern="unstructured", sparsity=0.6)}
IDS = torch.arange(3, 27).view(2, 12) * 37


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(assets.calibration_text().read_text()[:4000])
    return str(path)


@torch.no_grad()
def answers(model):
    return model(IDS)[0]


@torch.no_grad()
def generated(model):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_road(family, method, text, tmp_path):
    auto, each, blocks, dense = FAMILIES[family]
    auto_class = getattr(transformers, auto)
    source = helpers.tiny_model(tmp_path / "source", family, dtype=torch.float32, auto=auto)
    options = dict(method=method, dataset=text, num_samples=2, max_seq_len=32, **METHODS[method])
    result = convert(ConvertOptions.build(model=str(source), output_dir=tmp_path / "sparse", **options))
    checkpoint = Checkpoint.open(tmp_path / "sparse")
    assert len(checkpoint.weights) == each * blocks
    assert sorted(entry["name"] for entry in result["skipped"]) == sorted(dense)
    compressed = sum(entry.m * entry.n for entry in checkpoint.weights.values())
    left = sum(checkpoint.load(f"{name}.weight").numel() for name in dense)
    assert result["coverage_percent"] == round(100 * compressed / (compressed + left), 2)
    assert result["mean_sparsity"] == pytest.approx(0.5 if method == "magnitude" else 0.6, abs=0.01)
    assert verify(VerifyOptions(model=str(tmp_path / "sparse")))["ok"]

    sparse = auto_class.from_pretrained(tmp_path / "sparse").eval()
    assert len(list(sparse_linears(sparse))) == each * blocks
    (tmp_path / "dense").mkdir()
    DenseExporter().export(tmp_path / "sparse", tmp_path / "dense")
    plain = auto_class.from_pretrained(tmp_path / "dense").eval()
    assert not list(sparse_linears(plain))
    assert torch.allclose(answers(sparse), answers(plain), atol=1e-4)
    if auto == CAUSAL:
        assert torch.equal(generated(sparse), generated(plain))

    sparse.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert again.weights.keys() == checkpoint.weights.keys() and again.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(again.load(name), checkpoint.load(name)) for name in checkpoint.tensors)
    assert torch.equal(answers(load(tmp_path / "again")), answers(sparse))
