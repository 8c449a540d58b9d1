"""What the plugin reads off a folder before a weight is loaded, and the sizes that ranks can share."""

import json
import shutil

import pytest
import torch

from sparse_rt.checkpoint import read_json
from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.exporters.vllm.encodings import BITMASK, CANONICAL, DENSE, Int8
from sparse_rt.exporters.vllm.folders import CompressedTensorsFolder, DenseFolder, open_description
from sparse_rt.exporters.vllm.parallel import Heads, Weight, heads_of, refusal


def quantization(folder):
    return read_json(folder / "config.json")["quantization_config"]


def test_a_sparse_rt_folder_tells_patterns_sparsities_and_shapes(sparse_llama):
    folder = open_description(quantization(sparse_llama))
    name = "model.layers.0.mlp.down_proj"
    assert folder.weight(name).sparsity == 0.5 and folder.weight("lm_head") is None
    folder.read(sparse_llama)
    weight = folder.weight(name)
    assert weight.encoding is CANONICAL and folder.shapes[name] == (64, 160)
    assert "model.embed_tokens" in folder.shapes and "model.norm" not in folder.shapes


def test_a_folder_with_int8_values_tells_group_size_and_dtype(sparse_llama, tmp_path):
    Int8Exporter().export(sparse_llama, tmp_path, group_size=64)
    folder = open_description(quantization(tmp_path))
    name = "model.layers.0.mlp.down_proj"
    assert folder.weight(name).encoding == Int8(64) and folder.weight("lm_head") is None
    folder.read(tmp_path)
    assert folder.weight(name).encoding == Int8(64, torch.bfloat16) and folder.weight(name).sparsity == 0.5


@pytest.mark.parametrize("kind", ["sparse-bitmask", "sparse-24-bitmask"])
def test_a_compressed_tensors_folder_is_recognised(kind):
    stored = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": kind}}
    assert CompressedTensorsFolder.describes(stored)
    folder = open_description({**stored, "sparsity_config": {"format": kind, "ignore": ["lm_head"]}})
    weight = folder.weight("model.layers.0.mlp.up_proj")
    assert weight.encoding is BITMASK and weight.pattern == ("2:4" if "24" in kind else "unstructured")
    assert folder.weight("lm_head") is None


def test_other_quantized_folders_are_left_to_vllm():
    assert not CompressedTensorsFolder.describes({"quant_method": "gptq", "bits": 4})
    assert not CompressedTensorsFolder.describes({"quant_method": "compressed-tensors", "format": "pack-quantized"})
    dense = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    assert not CompressedTensorsFolder.describes(dense)


def test_sparse_and_quantized_at_once_is_refused():
    stored = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {}},
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    with pytest.raises(UserError, match="sparse .sparse-24-bitmask. and quantized"):
        CompressedTensorsFolder.describes(stored)


def test_a_dense_folder_says_nothing_beforehand(dense_llama):
    folder = DenseFolder()
    folder.read(dense_llama)
    assert folder.weight("model.layers.0.mlp.up_proj").encoding is DENSE and folder.sparsities is None
    assert folder.shapes["model.layers.0.mlp.up_proj"] == (160, 64)


def test_headers_are_checked(sparse_llama, tmp_path):
    config = quantization(sparse_llama)
    with pytest.raises(FormatError, match="format_version 9"):
        open_description({**config, "format_version": 9})
    with pytest.raises(FormatError, match="surprise"):
        open_description({**config, "surprise": 1})
    copy = shutil.copytree(sparse_llama, tmp_path / "copy")
    (index,) = copy.glob("*.index.json")
    described = json.loads(index.read_text())
    described["weight_map"]["model.layers.7.mlp.up_proj.weight_values"] = next(iter(described["weight_map"].values()))
    index.write_text(json.dumps(described))
    folder = open_description(config)
    with pytest.raises(FormatError, match="tensor model.layers.7.mlp.up_proj.weight_values is missing"):
        folder.read(copy)


LLAMA = {
    "model.layers.0.self_attn.q_proj": Weight(64, 64, "2:4"),
    "model.layers.0.self_attn.k_proj": Weight(32, 64, "2:4"),
    "model.layers.0.self_attn.o_proj": Weight(64, 64, "2:4"),
    "model.layers.0.mlp.gate_proj": Weight(96, 64, "2:4"),
    "model.layers.0.mlp.down_proj": Weight(64, 96, "2:4"),
    "model.embed_tokens": Weight(1000, 64),
}


def test_sizes_that_divide_are_accepted():
    for size in (1, 2, 4):
        assert refusal(LLAMA, Heads(4, 2), size) is None


@pytest.mark.parametrize(
    "change,heads,size,problem",
    [
        ({}, (6, 2), 4, "the model has 6 attention heads"),
        ({}, (12, 4), 3, "the model has 4 key-value heads"),
        ({"m.mlp.up_proj": Weight(97, 64)}, (4, 2), 2, "m.mlp.up_proj has 97 rows to share"),
        ({"m.mlp.gate_up_proj": Weight(2 * 97, 64)}, (4, 2), 2, "m.mlp.gate_up_proj has 97 rows to share"),
        ({"m.fc2": Weight(64, 98, "unstructured")}, (4, 4), 4, "m.fc2 has 98 columns to share"),
        ({"m.fc2": Weight(64, 24, "2:4")}, (4, 4), 4, "m.fc2 is 2:4, and in the part of a rank 6 columns are not"),
        ({"m.experts.0.w2": Weight(64, 24, "4:8")}, (2, 2), 2, "experts.0.w2 is 4:8, and in the part of a rank 12"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(change, heads, size, problem):
    sentence = refusal(LLAMA | change, Heads(*heads), size)
    assert sentence.startswith(f"--tensor-parallel-size {size} does not fit: ") and problem in sentence
    fitting = sentence.rpartition("sizes that do: ")[2].split(", ")
    assert "1" in fitting and str(size) not in fitting
    assert all(refusal(LLAMA | change, Heads(*heads), int(other)) is None for other in fitting)


def test_expert_parallelism_leaves_experts_whole():
    weights = {"m.experts.0.w2": Weight(64, 24, "4:8")}
    assert refusal(weights, Heads(2, 2), 2) and refusal(weights, Heads(2, 2), 2, expert_parallel=True) is None


def test_heads_come_from_either_kind_of_config(dense_llama):
    from transformers import AutoConfig

    assert heads_of(AutoConfig.from_pretrained(dense_llama)) == (4, 2)
    assert heads_of(read_json(dense_llama / "config.json")) == (4, 2)
    assert heads_of({"num_attention_heads": 8}) == (8, 8) and heads_of({}) is None
