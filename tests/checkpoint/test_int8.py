"""Folders with int8 values: written, described, read back widened or as they are, and refused by name when damaged."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import compressed, edit_config
from sparse_rt.checkpoint import (
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    CheckpointWriter,
    SparseConfig,
    output_directory,
    read_header,
    sparse_header,
)
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import dequantize, quantize

M, N, LAYER, OTHER = 24, 160, "layers.0.fc1", "layers.1.fc2"


def weight(name, pattern, dtype=torch.bfloat16):
    return compressed(M, N, pattern, 0.5, dtype, seed=int(name == OTHER))[:2]


def write(folder, pattern, group_size, dtype=torch.bfloat16, **options):
    fmt = get_format(pattern)
    config = SparseConfig(pattern=pattern, values="int8", group_size=group_size)
    with output_directory(folder) as partial:
        writer = CheckpointWriter(partial, {"model_type": "x"}, config, **options)
        for name in (LAYER, OTHER):
            values, metadata = weight(name, pattern, dtype)
            q, scales = quantize(fmt, values, metadata, M, N, group_size)
            writer.add_weight(name, pattern, M, N, q, metadata, scales, dtype)
        writer.add("norm.weight", torch.ones(N))
        writer.finish({"source": {"model": "none"}})
    return folder


@pytest.fixture(params=["2:4", "unstructured", "4:8"])
def folder(request, tmp_path):
    return write(tmp_path / "int8", request.param, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize("group_size", [None, 64, 128])
def test_weights_are_read_widened_and_as_they_are(tmp_path, pattern, group_size, dtype):
    checkpoint = Checkpoint.open(write(tmp_path / "int8", pattern, group_size, dtype))
    fmt = get_format(pattern)
    for name in (LAYER, OTHER):
        values, metadata = weight(name, pattern, dtype)
        q, scales = quantize(fmt, values, metadata, M, N, group_size)
        for found, written in zip(checkpoint.load_quantized(name), (q, scales, metadata), strict=True):
            assert torch.equal(found, written)
        widened, same = checkpoint.load_weight(name)
        assert widened.dtype == dtype and widened.shape == values.shape and torch.equal(same, metadata)
        assert torch.equal(widened, dequantize(fmt, q, scales, metadata, M, N, group_size, dtype))
        entry = checkpoint.weights[name]
        assert (entry.values, entry.group_size, entry.dtype) == ("int8", group_size, dtype)
        assert checkpoint.stored_bytes(name) == q.nbytes + scales.nbytes + metadata.nbytes
        assert checkpoint.compressed_tensors() >= {f"{name}.{part}" for part in (*fmt.tensor_names, "weight_scale")}
    assert checkpoint.dense_tensors() == ["norm.weight"]


def test_a_shard_describes_itself(tmp_path):
    folder = write(tmp_path / "int8", "2:4", 128, max_shard_bytes=4000)
    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    described = {"pattern": "2:4", "shape": [M, N], "values": "int8", "group_size": 128, "dtype": "bfloat16"}
    assert [header.sparse() for header in headers] == [
        {"format_version": 1, "weights": weights} for weights in ({LAYER: described}, {OTHER: described})
    ]
    names = {f"{LAYER}.{part}" for part in ("weight_values", "weight_meta", "weight_scale")}
    assert headers[0].tensors.keys() == names
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["values"], config["group_size"]) == (1, "int8", 128)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["weights"][LAYER] == {**described, "nnz": M * N // 2, "sparsity": 0.5}
    assert manifest["tensors"].keys() > names


def test_plain_folders_do_not_speak_of_groups():
    config = SparseConfig(pattern="2:4")
    assert "group_size" not in config.to_dict() and config.to_dict()["values"] == "plain"
    quantized = SparseConfig(pattern="2:4", values="int8")
    for described in (quantized.to_dict(), {**quantized.to_dict(), "group_size": None}):
        assert SparseConfig.from_dict(described) == quantized
    assert quantized.plain() == SparseConfig(pattern="2:4", values="int8", group_size=64).plain() == config


def test_a_folder_holds_int8_values_or_plain_ones(tmp_path):
    values, metadata = weight(LAYER, "2:4")
    q, scales = quantize(get_format("2:4"), values, metadata, M, N)
    plain = CheckpointWriter(tmp_path, {}, SparseConfig(pattern="2:4"))
    with pytest.raises(UserError, match=f"weight {LAYER}: values 'int8' of the config and scales"):
        plain.add_weight(LAYER, "2:4", M, N, q, metadata, scales, torch.bfloat16)
    quantized = CheckpointWriter(tmp_path, {}, SparseConfig(pattern="2:4", values="int8"))
    with pytest.raises(UserError, match=f"weight {LAYER}: values 'int8' of the config and scales"):
        quantized.add_weight(LAYER, "2:4", M, N, values, metadata)


def test_plain_weights_have_no_integers(sparse_llama):
    checkpoint = Checkpoint.open(sparse_llama)
    name = next(iter(checkpoint.weights))
    with pytest.raises(UserError, match="has plain values; load_weight reads them"):
        checkpoint.load_quantized(name)


def test_resume_keeps_what_was_described(tmp_path):
    def start(resume):
        config = SparseConfig(pattern="2:4", values="int8", group_size=64)
        return CheckpointWriter(tmp_path, {}, config, fingerprint="f", resume=resume)

    values, metadata = weight(LAYER, "2:4")
    q, scales = quantize(get_format("2:4"), values, metadata, M, N, 64)
    writer = start(False)
    writer.add_weight(LAYER, "2:4", M, N, q, metadata, scales, torch.float16)
    writer.flush()
    start(True).finish()
    assert Checkpoint.open(tmp_path).weights[LAYER].dtype == torch.float16


def test_a_models_own_scales_are_no_business_of_a_plain_folder(tmp_path):
    writer = CheckpointWriter(tmp_path, {}, SparseConfig(pattern="2:4"))
    writer.add_weight(LAYER, "2:4", M, N, *weight(LAYER, "2:4"))
    writer.add("norm.weight_scale", torch.ones(3))
    writer.finish()
    assert Checkpoint.open(tmp_path).dense_tensors() == ["norm.weight_scale"]


def rewrite(folder, change):
    """Apply ``change(tensors, weights)`` to the one shard; index and header stay in step."""
    (file,) = folder.glob("*.safetensors")
    tensors, weights = load_file(file), read_header(file).sparse()["weights"]
    change(tensors, weights)
    save_file(tensors, file, metadata=sparse_header(weights))
    listed = json.loads((folder / INDEX_NAME).read_text())
    listed["weight_map"] = dict.fromkeys(tensors, file.name)
    (folder / INDEX_NAME).write_text(json.dumps(listed))


def replace(suffix, made):
    return lambda tensors, weights: tensors.update({f"{LAYER}.{suffix}": made(tensors[f"{LAYER}.{suffix}"])})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, w: t.pop(f"{LAYER}.weight_scale"), f"tensor {LAYER}.weight_scale is missing"),
        (lambda t, w: t.pop(f"{LAYER}.weight_values"), f"tensor {LAYER}.weight_values is missing"),
        (replace("weight_scale", torch.Tensor.half), rf"{LAYER}.weight_scale is torch.float16 \(24, 3\)"),
        (replace("weight_scale", lambda s: s[:, :2].clone()), r"\(24, 2\), an int8 weight of \(24, 160\) .*\(24, 3\)"),
        (replace("weight_values", torch.Tensor.float), f"{LAYER}.weight_values is torch.float32"),
        (lambda t, w: w[LAYER].pop("dtype"), f"int8 weight {LAYER} has dtype None; allowed are bfloat16"),
        (lambda t, w: w[LAYER].update(dtype="int8"), f"int8 weight {LAYER} has dtype 'int8'"),
        (lambda t, w: w[LAYER].update(group_size=128), "group_size 128, config.json says 'int8' and 64"),
        (lambda t, w: w[LAYER].update(values="plain"), "has values 'plain'"),
        (lambda t, w: w[LAYER].pop("values"), "has values 'plain'"),
        (lambda t, w: t.update({"head.weight_scale": torch.ones(2)}), "extra tensor head.weight_scale"),
    ],
)
def test_headers_that_contradict_each_other_are_refused_by_name(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint.open(folder)
    if "missing" not in message and "extra" not in message:
        assert re.search("; copy the folder again,? or (convert or )?export it again$", str(caught.value))


def set_last(value):
    def made(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return made


@pytest.mark.parametrize(
    "change, message",
    [
        (replace("weight_values", set_last(-128)), f"{LAYER}.weight_values holds -128 at row 23"),
        (replace("weight_scale", set_last(-1.0)), f"{LAYER}.weight_scale holds -1.0 at row 23, group 2"),
        (replace("weight_scale", set_last(float("nan"))), f"{LAYER}.weight_scale holds nan at row 23, group 2"),
        (replace("weight_scale", set_last(3e38)), rf"{LAYER}.weight_values \* weight_scale as torch.bfloat16 holds"),
    ],
)
def test_data_that_cannot_be_is_refused_by_name(folder, change, message):
    rewrite(folder, change)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(FormatError, match=message) as caught:
        checkpoint.load_weight(LAYER)
    assert str(caught.value).endswith(("; copy the folder again or export it again", "weights must be finite"))
    checkpoint.load_weight(OTHER)


def test_config_and_shards_must_agree(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_config(copy, group_size=128)
    with pytest.raises(FormatError, match="group_size 64, config.json says 'int8' and 128"):
        Checkpoint.open(copy)
    edit_config(copy, values="plain", group_size=None)
    with pytest.raises(FormatError, match="has values 'int8' and group_size 64, config.json says 'plain' and None"):
        Checkpoint.open(copy)
