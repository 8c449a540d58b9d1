"""inspect: the figures are those of the files, and a dense folder is told what its zeros obey."""

import json

import torch
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import InspectOptions
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.workflows.inspect import inspect, obeyed_patterns


def test_a_sparse_model(sparse_llama, dense_llama, tmp_path):
    result = inspect(InspectOptions(model=str(sparse_llama), plot=tmp_path / "plots" / "sparsity.png"))
    json.dumps(result)
    checkpoint = Checkpoint.open(sparse_llama)
    weights = {weight["name"]: weight for weight in result["weights"]}
    assert weights.keys() == checkpoint.weights.keys() and result["kind"] == "sparse-rt"
    for name, weight in weights.items():
        values, metadata = checkpoint.load_weight(name)
        assert weight["bytes"] == values.nbytes + metadata.nbytes
        assert weight["dense_bytes"] == 2 * weight["shape"][0] * weight["shape"][1]
        assert weight["compression"] == 0.5625 and weight["sparsity"] == 0.5
    totals = result["totals"]
    dense = sum(t.nbytes for t in load_file(dense_llama / "model.safetensors").values())
    assert totals["dense_bytes"] == dense and totals["bytes"] == checkpoint.total_bytes
    linear = sum(w["dense_bytes"] for w in weights.values())
    assert totals["coverage_percent"] == round(100 * linear / (linear + 2 * 4096 * 64), 2)
    assert [(s["name"], s["reason"]) for s in result["skipped"]] == [("lm_head", "ignored by config.json")]
    assert (tmp_path / "plots" / "sparsity.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_written_by_save_pretrained(sparse_llama, tmp_path):
    load(sparse_llama).save_pretrained(tmp_path / "saved")
    saved, original = (inspect(InspectOptions(model=str(m))) for m in (tmp_path / "saved", sparse_llama))
    key = lambda weight: weight["name"]  # noqa: E731
    assert sorted(saved["weights"], key=key) == sorted(original["weights"], key=key)
    assert saved["totals"] == original["totals"]


def test_a_dense_folder_is_told_how_to_convert(dense_llama, tmp_path):
    result = inspect(InspectOptions(model=str(dense_llama)))
    assert result["totals"]["mean_sparsity"] == 0 and "choose a method" in result["suggestion"]
    assert {tuple(weight["obeys"]) for weight in result["weights"]} == {()}
    pruned = helpers.tiny_llama(tmp_path / "pruned")
    tensors = load_file(pruned / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = torch.where(get_format("2:4").mask_from_scores(tensor.float().abs()), tensor, 0)
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    result = inspect(InspectOptions(model=str(pruned)))
    weights = {weight["name"]: weight for weight in result["weights"]}
    assert weights["model.layers.0.mlp.up_proj"] | {"shape": 0} == {
        "name": "model.layers.0.mlp.up_proj",
        "shape": 0,
        "dtype": "bfloat16",
        "dense_bytes": 2 * 160 * 64,
        "sparsity": 0.5,
        "obeys": ["2:4", "4:8", "8:16", "16:32"],
        "detected": "2:4",
    }
    assert weights["lm_head"]["sparsity"] == 0
    assert result["suggestion"] == "the weights are pruned: convert --method none --pattern 2:4"
    for name, change in (("self_attn.k_proj", 0.5), ("mlp.up_proj", 0)):
        tensors[f"model.layers.0.{name}.weight"][:, ::2] = change
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    result = inspect(InspectOptions(model=str(pruned)))
    assert result["suggestion"].endswith("convert --method none, which finds 13 2:4, 1 unstructured")


def test_obeyed_patterns():
    kept = torch.zeros(2, 24, dtype=torch.bool)
    assert obeyed_patterns(kept) == ["1:4", "1:8"]  # 24 columns are no groups of 16 or 32
    kept[1, :3] = True
    assert obeyed_patterns(kept) == ["3:4", "3:8"]
    kept[1, :8] = True
    assert obeyed_patterns(kept) == []
