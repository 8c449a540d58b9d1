"""The sparse-bitmask layout: names, dtypes and bytes of one weight by hand, whole folders, and damage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.config import ConvertOptions, ExportOptions
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.compressed_tensors import CompressedTensorsExporter, sparse_bitmask
from sparse_rt.formats import get_format
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export


def exported(source, output, **options):
    return export(ExportOptions.build(model=str(source), output_dir=output, to="compressed-tensors", **options))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_layout_of_one_weight(pattern):
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 4.0, 0.0, 0.0, 0.0, 5.0, 6.0]] * 2)
    fmt = get_format(pattern)
    parts = sparse_bitmask(pattern, *fmt.compress(weight, fmt.mask_of(weight)), 2, 12)
    assert parts["compressed"].tolist() == [1, 2, 3, 4, 5, 6] * 2
    assert parts["bitmask"].dtype == torch.uint8 and parts["bitmask"].tolist() == [[0b01011010, 0b1100]] * 2
    assert parts["row_offsets"].dtype == torch.int64 and parts["row_offsets"].tolist() == [0, 6]
    assert parts["shape"].dtype == torch.int64 and parts["shape"].tolist() == [2, 12]


def test_an_explicit_zero_stays_a_position():
    weight = torch.tensor([[0.0, 0.0, 0.0, 7.0]])
    fmt = get_format("2:4")
    parts = sparse_bitmask("2:4", *fmt.compress(weight, fmt.mask_of(weight)), 1, 4)
    assert parts["compressed"].tolist() == [0.0, 7.0] and parts["bitmask"].tolist() == [[0b1001]]


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
def test_folder_holds_the_weights_bit_for_bit(pattern, dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", pattern)
    result = exported(source, tmp_path / "ct", check=True)
    assert result["check"] == {"weights_equal": 14}
    original, written = SourceCheckpoint.open(dense_llama), SourceCheckpoint.open(tmp_path / "ct")
    name = "model.layers.1.mlp.down_proj"
    parts = {part: written.load(f"{name}.{part}") for part in ("compressed", "bitmask", "row_offsets", "shape")}
    assert f"{name}.weight" not in written.tensors and parts["shape"].tolist() == [64, 160]
    mask = np.unpackbits(parts["bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
    assert torch.equal(original.load(f"{name}.weight")[torch.from_numpy(mask)], parts["compressed"])
    assert torch.equal(written.load("lm_head.weight"), original.load("lm_head.weight"))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "version", "sparsity_config"}
    assert config["quant_method"] == "compressed-tensors"
    assert config["sparsity_config"] == {
        "format": "sparse-bitmask",
        "global_sparsity": 0.5,
        "ignore": ["lm_head", "model.embed_tokens"],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4" if pattern == "2:4" else "unstructured",
        "targets": ["Linear"],
    }
    assert "refuse this folder" in (tmp_path / "ct" / "README.md").read_text()


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_convert_reads_it_back_without_loss(pattern, dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", pattern)
    exported(source, tmp_path / "ct")
    convert(
        ConvertOptions.build(model=str(tmp_path / "ct"), output_dir=tmp_path / "back", pattern=pattern, method="none")
    )
    first, back = Checkpoint.open(source), Checkpoint.open(tmp_path / "back")
    assert first.weights.keys() == back.weights.keys()
    for name in first.tensors:
        assert torch.equal(first.load(name), back.load(name)), name


@pytest.mark.parametrize(
    ("part", "message"), [("compressed", "1 of 4096 weights differ"), ("bitmask", "contradict each other")]
)
def test_check_sees_damage(part, message, dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", "unstructured")
    exported(source, tmp_path / "ct")
    (file,) = (tmp_path / "ct").glob("*.safetensors")
    tensors = load_file(file)
    tensor = tensors[f"model.layers.0.self_attn.q_proj.{part}"].view(-1)
    tensor[3] = tensor[3] ^ 1 if part == "bitmask" else -tensor[3]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=message):
        CompressedTensorsExporter().check(source, tmp_path / "ct")


def test_size_is_that_of_the_source(dense_llama, tmp_path):
    """Row offsets are the only addition: 8 bytes a row, and 16 a weight for its shape."""
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", "unstructured")
    result = exported(source, tmp_path / "ct")
    checkpoint = Checkpoint.open(source)
    extra = sum(8 * entry.m + 16 for entry in checkpoint.weights.values())
    assert result["facts"]["weight_bytes"] == checkpoint.total_bytes + extra
