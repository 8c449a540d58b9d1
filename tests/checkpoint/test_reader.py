"""A damaged or foreign folder is refused by name; a good one opens by headers alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import edit_config
from sparse_rt.checkpoint import INDEX_NAME, Checkpoint, SourceCheckpoint, resolve_model
from sparse_rt.checkpoint.header import read_header
from sparse_rt.errors import FormatError, UserError

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(sparse_llama, tmp_path):
    return shutil.copytree(sparse_llama, tmp_path / "model")


def shard(folder):
    return next(folder.glob("sparse_rt-*.safetensors"))


def rewrite(folder, change, index=True):
    """Apply ``change`` to the tensors of the one shard, keeping its header text (and the index in step)."""
    path = shard(folder)
    metadata = read_header(path).metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    if index:
        listed = json.loads((folder / INDEX_NAME).read_text())
        listed["weight_map"] = dict.fromkeys(tensors, path.name)
        (folder / INDEX_NAME).write_text(json.dumps(listed))


def test_a_good_folder_opens_and_tells_what_is_inside(folder):
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.weights) == 14
    entry = checkpoint.weights[LAYER]
    assert (entry.m, entry.n, entry.sparsity, entry.dtype) == (64, 160, 0.5, torch.bfloat16)
    values, metadata = checkpoint.load_weight(LAYER)
    assert values.numel() == entry.nnz and metadata.dtype == torch.uint8
    assert "model.embed_tokens.weight" in checkpoint.dense_tensors()
    assert not any("weight_values" in name for name in checkpoint.dense_tensors())
    assert checkpoint.total_bytes < SourceCheckpoint.open(folder).total_bytes + 1


def test_truncated_shard(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=rf"{path.name}: truncated: tensor .* ends at byte"):
        Checkpoint.open(folder)
    path.write_bytes(b"\x01\x02")
    with pytest.raises(FormatError, match="truncated or not a safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("suffix", ["weight_values", None])
def test_missing_tensor_of_a_weight(folder, suffix):
    suffix = suffix or Checkpoint.open(folder).quantization.pattern.replace("2:4", "weight_meta")
    suffix = suffix.replace("unstructured", "weight_bitmask")
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.{suffix}"))
    with pytest.raises(FormatError, match=rf"tensor {LAYER}.{suffix} is missing"):
        Checkpoint.open(folder)


def test_tensor_that_only_the_index_knows_and_the_other_way_round(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"), index=False)
    with pytest.raises(FormatError, match=r"tensor model.norm.weight is missing: .*index.json places it"):
        Checkpoint.open(folder)
    rewrite(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64), "spare": torch.ones(2)}), False
    )
    with pytest.raises(FormatError, match="extra tensor spare"):
        Checkpoint.open(folder)


def test_extra_compressed_and_doubly_stored_tensors(folder):
    rewrite(folder, lambda tensors: tensors.update({"other.weight_values": torch.ones(4)}))
    with pytest.raises(FormatError, match="extra tensor other.weight_values"):
        Checkpoint.open(folder)
    rewrite(
        folder, lambda tensors: (tensors.pop("other.weight_values"), tensors.update({f"{LAYER}.weight": torch.ones(2)}))
    )
    with pytest.raises(FormatError, match=rf"extra tensor {LAYER}.weight: the weight .* is stored compressed as well"):
        Checkpoint.open(folder)


def test_sizes_that_contradict_the_shape(folder):
    def shorten(tensors):
        tensors[f"{LAYER}.weight_values"] = tensors[f"{LAYER}.weight_values"][..., :-1].clone()

    pattern = Checkpoint.open(folder).quantization.pattern
    rewrite(folder, shorten)
    if pattern == "2:4":
        with pytest.raises(FormatError, match=rf"{LAYER}.weight_values has shape \(64, 79\).*needs \(64, 80\)"):
            Checkpoint.open(folder)
    else:  # a ragged tensor is legal by its header alone; its popcount tells
        with pytest.raises(FormatError, match=rf"{LAYER}: weight_bitmask marks 5120 .* weight_values holds 5119"):
            Checkpoint.open(folder).load_weight(LAYER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this build reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"pattern": "9:3"}, "quantization_config.pattern: pattern '9:3'"),
        ({"pattern": 124}, "is a number|in quotes"),
        ({"values": "int4"}, "values are stored as 'int4', this build reads 'plain' and 'int8'"),
        (
            {"values": "int4", "zero_points": True, "group_size": 32},
            "values are stored as 'int4', .*install a newer sparse-rt",
        ),
        ({"values": "int8"}, "has values 'plain' and group_size None, config.json says 'int8' and None"),
        (
            {"values": "int8", "group_size": 96},
            "group_size: group_size 96 is unknown; allowed are 64, 128, 256 columns",
        ),
        ({"group_size": 128}, "quantization_config.group_size: it is 128, and only values 'int8' have groups"),
        ({"surprise": 1}, "surprise"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'.*sparse-rt convert"),
        ({"pattern": "4:8"}, "is stored as .*config.json says 4:8"),
        ({"ignore": ["lm_head", "down_proj"]}, r"config.json says dense \(ignored\)"),
    ],
)
def test_config_that_cannot_be_read_or_contradicts_the_shards(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_missing_shard_broken_json_and_pickle_folders(folder, tmp_path):
    shard(folder).unlink()
    with pytest.raises(FormatError, match=r"index.json names sparse_rt-00001-of-00001.safetensors, which is not in"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Checkpoint.open(folder)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="pickle weights"):
        SourceCheckpoint.open(pickled)


def test_a_name_that_is_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(UserError, match="neither a local folder nor a reachable hub model"):
        resolve_model("no-such/model-at-all")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        resolve_model(file)
