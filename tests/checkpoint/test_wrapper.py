"""Folders with wrapped weights: their exact bytes, what is read back, and what is refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import edit_config
from sparse_rt.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    SparseConfig,
    output_directory,
    read_header,
    sparse_header,
)
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats.wrapper import Wrapper

LAYER = "layers.0.fc1"
CORE = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0], [0, 5, 6, 0, 7, 0, 0, -1]])
OUT = torch.tensor([[[1.0, 0.5], [0, 2]]])
INNER = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.25, 0, 0, 1]], torch.eye(4).tolist()])
CONFIG = SparseConfig(pattern="2:4", wrapper="block_diagonal")


def write(folder, config=CONFIG, wrapper=Wrapper(OUT, INNER), dtype=torch.bfloat16):  # noqa: B008 (never changed)
    with output_directory(folder) as partial:
        writer = CheckpointWriter(partial, {"model_type": "x"}, config)
        values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, -1]], dtype=dtype)
        metadata = torch.tensor([[0x9C], [0xC9]], dtype=torch.uint8)
        writer.add_weight(LAYER, "2:4", 2, 8, values, metadata, wrapper=wrapper and wrapper.to(dtype))
        writer.add("norm.weight", torch.ones(8, dtype=dtype))
        writer.finish()
    return folder


def change(folder, edit):
    """Write the shard again after ``edit(tensors, described weights)``."""
    (path,) = folder.glob("*.safetensors")
    tensors, weights = load_file(path), read_header(path).sparse()["weights"]
    edit(tensors, weights)
    save_file(tensors, path, metadata=sparse_header(weights))
    index = next(folder.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, path.name)}))


def test_bytes_of_a_wrapped_weight(tmp_path):
    """These never change: version 1 is read by every later release."""
    (path,) = write(tmp_path / "model").glob("*.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, start = json.loads(data[8 : 8 + length]), 8 + length
    assert json.loads(header["__metadata__"]["sparse_rt"]) == {
        "format_version": 1,
        "weights": {LAYER: {"pattern": "2:4", "shape": [2, 8], "wrapper": "block_diagonal"}},
    }
    expected = {
        # bfloat16, low byte first
        "weight_values": ([2, 4], "803f 0040 4040 8040 a040 c040 e040 80bf"),
        "weight_meta": ([2, 1], "9c c9"),
        "weight_wrapper_out": ([1, 2, 2], "803f 003f 0000 0040"),
        "weight_wrapper_in": (
            [2, 4, 4],
            "803f 0000 0000 0000  0000 803f 0000 0000  0000 0000 803f 0000  803e 0000 0000 803f"
            "803f 0000 0000 0000  0000 803f 0000 0000  0000 0000 803f 0000  0000 0000 0000 803f",
        ),
    }
    for suffix, (shape, text) in expected.items():
        described = header[f"{LAYER}.{suffix}"]
        begin, end = described["data_offsets"]
        assert described["shape"] == shape
        assert data[start + begin : start + end] == bytes.fromhex(text), suffix
    config = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["values"], config["wrapper"]) == (1, "plain", "block_diagonal")


def test_plain_folders_do_not_speak_of_wrappers():
    """Builds of before refuse a config with this key, and shall read folders without wrappers."""
    assert "wrapper" not in SparseConfig(pattern="2:4").to_dict()
    assert SparseConfig.from_dict(CONFIG.to_dict()) == CONFIG.plain() == CONFIG


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_read_as_core_and_wrapper_or_as_their_product(tmp_path, dtype):
    checkpoint = Checkpoint.open(write(tmp_path / "model", dtype=dtype))
    entry = checkpoint.weights[LAYER]
    assert (entry.wrapper, entry.nnz, entry.dtype, entry.sparsity) == ((2, 4), 8, dtype, 0.5)
    values, metadata, wrapper = checkpoint.load_core(LAYER)
    assert torch.equal(wrapper.out, OUT.to(dtype)) and torch.equal(wrapper.inner, INNER.to(dtype))
    expected = torch.block_diag(*OUT) @ CORE @ torch.block_diag(*INNER)
    assert torch.equal(checkpoint.load_dense(LAYER), expected.to(dtype))
    size = values.nbytes + metadata.nbytes + wrapper.nbytes
    assert checkpoint.stored_bytes(LAYER) == size == 2 + 44 * dtype.itemsize
    assert checkpoint.dense_tensors() == ["norm.weight"]


def test_who_does_not_ask_for_the_wrapper_does_not_get_the_core(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "model"))
    with pytest.raises(UserError, match=f"{LAYER} cannot be read as values and metadata: .* has wrapped weights"):
        checkpoint.load_weight(LAYER)
    plain = Checkpoint.open(write(tmp_path / "plain", SparseConfig(pattern="2:4"), None))
    assert plain.load_core(LAYER)[2] is None and plain.weights[LAYER].wrapper is None
    assert torch.equal(plain.load_dense(LAYER), CORE.to(torch.bfloat16))


def test_a_folder_has_wrapped_weights_or_plain_ones(tmp_path):
    message = f"weight {LAYER}: the wrapper of the config and that of a weight come together, or neither"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "a", CONFIG, None)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "b", SparseConfig(pattern="2:4"))


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda t, w: t.pop(f"{LAYER}.weight_wrapper_in"), rf"tensor {LAYER}.weight_wrapper_in is missing"),
        (lambda t, w: w[LAYER].pop("wrapper"), "has wrapper None, config.json says 'block_diagonal'"),
        (lambda t, w: w[LAYER].update(wrapper="dense"), "has wrapper 'dense', config.json says 'block_diagonal'"),
        (
            lambda t, w: t.update({f"{LAYER}.weight_wrapper_in": torch.zeros(4, 4, dtype=torch.bfloat16)}),
            r"weight_wrapper_in is torch.bfloat16 \(4, 4\), .* square blocks \(k, b, b\) with k \* b = 8",
        ),
        (
            lambda t, w: t.update({f"{LAYER}.weight_wrapper_out": OUT.clone()}),
            "weight_wrapper_out is torch.float32 .* needs torch.bfloat16",
        ),
        (
            lambda t, w: t.update({"norm.weight_wrapper_out": OUT.clone()}),
            "extra tensor norm.weight_wrapper_out: no shard header announces",
        ),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path, edit, message):
    folder = write(tmp_path / "model")
    change(folder, edit)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_a_matrix_that_is_not_finite_is_refused_when_it_is_read(tmp_path):
    folder = write(tmp_path / "model")
    change(folder, lambda t, w: t[f"{LAYER}.weight_wrapper_out"].fill_(float("inf")))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(FormatError, match=f"{LAYER}.weight_wrapper_out holds inf at position"):
        checkpoint.load_core(LAYER)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"wrapper": "circulant"}, "quantization_config.wrapper: it is 'circulant', this build reads 'block_diagonal'"),
        ({"values": "int8"}, "quantization_config.wrapper: it is 'block_diagonal', and only plain values have"),
        ({"wrapper": None}, "has wrapper 'block_diagonal', config.json says None"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    folder = write(tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(FormatError, match=re.escape(message)):
        Checkpoint.open(folder)
