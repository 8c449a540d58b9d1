"""Folders with int8 values in transformers: widened while they are read, plain in memory and plain when saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import helpers
from sparse_rt.checkpoint import Checkpoint, read_header
from sparse_rt.errors import FormatError
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears

IDS = torch.arange(5, 29).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module", params=[("2:4", 64), ("unstructured", None), ("4:8", 128)], ids=str)
def folder(request, dense_llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    pattern, group_size = request.param
    plain = helpers.compress_folder(dense_llama, root / "plain", pattern)
    (root / "int8").mkdir()
    Int8Exporter().export(plain, root / "int8", group_size=group_size)
    return root / "int8"


def assert_holds(model, folder, dtype):
    """Every layer holds what the checkpoint gives, in the model's dtype, and nothing else."""
    checkpoint = Checkpoint.open(folder)
    layers = dict(sparse_linears(model))
    assert len(layers) == len(checkpoint.weights) == 14
    for name, module in layers.items():
        values, metadata = checkpoint.load_weight(name if name in checkpoint.weights else f"model.{name}")
        assert module.values.dtype == dtype and torch.equal(module.values, values.to(dtype))
        assert torch.equal(module.metadata, metadata) and not module.values.requires_grad
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert "weight_scale" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_hold_the_widened_values_in_the_models_dtype(folder, dtype):
    model = load(folder, dtype=dtype)
    assert_holds(model, folder, dtype)
    assert torch.isfinite(logits(model)).all()


def test_logits_are_those_of_a_plain_folder_with_the_same_values(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    described = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert described["values"] == "plain" and "group_size" not in described
    saved = Checkpoint.open(tmp_path / "saved")
    assert not any(name.endswith("weight_scale") for name in saved.tensors)
    again = load(tmp_path / "saved")
    assert_holds(again, folder, torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


def test_dequantize_gives_an_ordinary_model(folder):
    dense = load(folder, dequantize=True)
    assert not list(sparse_linears(dense)) and torch.equal(logits(dense), logits(load(folder)))


def test_a_model_without_head_finds_its_weights(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert_holds(model, folder, torch.bfloat16)


def test_offload_to_disk_gives_the_same_logits(folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.down_proj.weight_values.is_meta
    assert torch.equal(logits(model), logits(load(folder)))


def lowest(tensors, name):
    tensors[f"{name}.weight_values"].view(-1)[7] = -128


def negative(tensors, name):
    tensors[f"{name}.weight_scale"].view(-1)[0] = -1.0


def mask(tensors, name):
    key = next(key for key in tensors if key in (f"{name}.weight_meta", f"{name}.weight_bitmask"))
    tensors[key][3, 2] = 0


@pytest.mark.parametrize(
    "damage, message",
    [
        (lowest, "weight_values holds -128 at row 0"),
        (negative, r"weight_scale holds -1.0 at row 0, group 0"),
        (mask, "(row|marks)"),
    ],
)
def test_damage_is_refused_at_load_with_the_tensors_name(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = copy.glob("*.safetensors")
    tensors, metadata = load_file(file), read_header(file).metadata
    damage(tensors, "model.layers.1.mlp.up_proj")
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(FormatError, match=rf"model.layers.1.mlp.up_proj.*{message}"):
        load(copy)


@pytest.mark.parametrize("family", ["qwen2", "opt", "phi3"])
def test_other_families(family, tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", family)
    plain = helpers.compress_folder(dense, tmp_path / "plain", "2:4")
    (tmp_path / "int8").mkdir()
    Int8Exporter().export(plain, tmp_path / "int8", group_size=64)
    model, checkpoint = load(tmp_path / "int8"), Checkpoint.open(tmp_path / "int8")
    layers = dict(sparse_linears(model))
    assert layers.keys() == checkpoint.weights.keys()
    assert all(torch.equal(layers[name].values, checkpoint.load_weight(name)[0]) for name in layers)
    difference = (logits(model) - logits(load(plain))).float().norm()
    assert 0 < difference <= 0.05 * logits(load(plain)).float().norm()
