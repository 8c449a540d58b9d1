"""Checkpoints that old releases of compressed-tensors wrote are read bit for bit, or refused before any work."""

import json
import shutil

import pytest
import torch

import helpers
from legacy_folders import GOLDEN, golden_tensors
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.config import ConvertOptions, ExportOptions
from sparse_rt.errors import FormatError, UserError
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export

FOLDERS = sorted(folder.name for folder in GOLDEN.glob("ct-*"))
QUANTIZED = sorted((GOLDEN / "quantized").glob("*.json"))


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_comes_out_as_it_went_in(name, tmp_path):
    pattern = "2:4" if "-24-" in name else "unstructured"
    dtype = getattr(torch, name.rpartition("-")[2])
    options = dict(model=str(GOLDEN / name), output_dir=tmp_path / "sparse", method="none", pattern=pattern)
    result = convert(ConvertOptions.build(**options))
    assert result["source"]["kind"] == "compressed-tensors" and len(result["sparsity"]) == 7
    export(ExportOptions.build(model=str(tmp_path / "sparse"), output_dir=tmp_path / "dense", to="dense"))
    found, expected = SourceCheckpoint.open(tmp_path / "dense"), golden_tensors(dtype, pattern)
    assert set(found.tensors) == set(expected)  # biases and norms included, which the first releases compressed, too
    for tensor, weight in expected.items():
        assert found.load(tensor).dtype == dtype
        assert torch.equal(bits(found.load(tensor)), bits(weight + 0.0)), tensor  # + 0.0: no negative zero is kept


@pytest.mark.parametrize("section", QUANTIZED, ids=lambda path: path.stem)
def test_sparse_and_quantized_models_are_refused_before_their_weights_are_opened(section, tmp_path):
    shutil.copytree(GOLDEN / "ct-0.9.4-sparse-24-bitmask-bfloat16", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": json.loads(section.read_text())}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(
        UserError, match=r"is sparse \(.+\) and quantized \(.+\).*from before its quantization"
    ) as error:
        convert(ConvertOptions.build(model=str(tmp_path / "model"), output_dir=tmp_path / "out", method="none"))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_golden_folder_with_a_damaged_shape_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(GOLDEN / "ct-0.9.4-sparse-24-bitmask-bfloat16", tmp_path / "model")
    for damage, words in (
        (lambda shape: shape * 2, r"q_proj.bitmask has shape \(16, 2\), a weight of shape \(32, 32\) needs"),
        (lambda shape: shape[:0], r"q_proj.shape says \[\], which is not the shape of a tensor"),
    ):
        tensors = load_file(GOLDEN / "ct-0.9.4-sparse-24-bitmask-bfloat16" / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.shape"
        tensors[name] = damage(tensors[name]).clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FormatError, match=words):
            convert(ConvertOptions.build(model=str(model), output_dir=tmp_path / "out", method="none"))


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
def test_an_export_has_the_tensors_that_the_release_wrote(layout, tmp_path):
    """The golden folder, converted and exported again: names, dtypes, shapes and bytes of the weights are the same."""
    (name,) = [name for name in FOLDERS if name.startswith(f"ct-0.14.0.1-{layout}")]
    pattern = "2:4" if "-24-" in name else "unstructured"
    options = dict(model=str(GOLDEN / name), output_dir=tmp_path / "sparse", method="none", pattern=pattern)
    convert(ConvertOptions.build(**options))
    chosen = dict(to="compressed-tensors", options={"layout": layout}, check=True)
    result = export(ExportOptions.build(model=str(tmp_path / "sparse"), output_dir=tmp_path / "ct", **chosen))
    assert result["facts"]["layout"] == layout and result["check"] == {"weights_equal": 7}
    theirs, ours = SourceCheckpoint.open(GOLDEN / name), SourceCheckpoint.open(tmp_path / "ct")
    assert set(theirs.tensors) == set(ours.tensors)
    for tensor in theirs.tensors:
        a, b = theirs.load(tensor), ours.load(tensor)
        assert a.dtype == b.dtype and torch.equal(a, b), tensor  # a kept -0.0 is +0.0 in the export
    sections = [
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (GOLDEN / name, tmp_path / "ct")
    ]
    formats = [section["sparsity_config"]["format"] for section in sections]
    assert formats == [layout, layout]


def test_the_layout_for_2_4_refuses_other_patterns(dense_llama, tmp_path):
    source = helpers.compress_folder(dense_llama, tmp_path / "sparse", "4:8")
    chosen = dict(to="compressed-tensors", options={"layout": "sparse-24-bitmask"})
    with pytest.raises(UserError, match=r"takes weights that are 2:4, and model\.\S+ is 4:8; leave the option out"):
        export(ExportOptions.build(model=str(source), output_dir=tmp_path / "ct", **chosen))
