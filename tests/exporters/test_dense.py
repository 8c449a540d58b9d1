"""The dense export: what plain transformers loads is the compressed model, zeros exact."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.config import ExportOptions
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.dense import DenseExporter
from sparse_rt.formats import get_format
from sparse_rt.workflows.export import export


def dense(source, output, **options):
    return export(ExportOptions.build(model=str(source), output_dir=output, to="dense", **options))


def test_plain_transformers_agrees_in_a_fresh_process(dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", "unstructured")
    result = dense(source, tmp_path / "dense", check=True)
    assert result["check"]["max_difference"] <= 1e-5 * max(1.0, result["check"]["logit_scale"])
    assert result["check"]["weights_equal"] == 14
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_every_tensor_is_bit_equal_and_zeros_are_exact(pattern, dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", pattern)
    dense(source, tmp_path / "dense", options={"max_shard_size": "200kB"})
    compressed, written = Checkpoint.open(source), SourceCheckpoint.open(tmp_path / "dense")
    assert len(written.headers) > 3
    original = SourceCheckpoint.open(dense_llama)
    assert set(written.tensors) == set(original.tensors)
    for name, entry in compressed.weights.items():
        _, metadata = compressed.load_weight(name)
        mask = get_format(entry.pattern).unpack_mask(metadata, entry.m, entry.n)
        weight = written.load(f"{name}.weight")
        assert torch.equal(weight[mask], original.load(f"{name}.weight")[mask])
        assert not weight[~mask].view(torch.int16).any()  # +0.0, bit for bit
    for name in compressed.dense_tensors():
        assert torch.equal(written.load(name), original.load(name))


@pytest.mark.parametrize("where", ["kept", "pruned"])
def test_check_sees_one_wrong_weight(where, dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", "2:4")
    dense(source, tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    tensors = load_file(file)
    weight = tensors["model.layers.0.self_attn.q_proj.weight"].view(-1)
    position = int(((weight != 0) if where == "kept" else (weight == 0)).nonzero()[7])
    weight[position] = 3.0 if where == "kept" else -0.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"q_proj: 1 of 4096"):
        DenseExporter().check(source, tmp_path / "dense")
