"""Weights as torch pickles: dense ones, and torch's 2:4 tensors. Read bit for bit; nothing in them is ever run."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

import helpers
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.config import ConvertOptions, ExportOptions, InspectOptions
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export
from sparse_rt.workflows.inspect import inspect

NAME = "model.layers.0.mlp.up_proj.weight"
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def run(model, output, **options):
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **{"method": "none", **options}))


def pruned(folder, pattern):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = torch.where(get_format(pattern).mask_from_scores(tensor.float().abs(), 0.6), tensor, 0)
    return tensors


def save(dense, target, state, name="pytorch_model.bin", **how):
    shutil.copytree(dense, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    torch.save(state, target / name, **how)
    return target


def cutlass(weight):
    """What torch makes of a 2:4 weight; its ``from_dense`` wants a GPU, all that it calls does not."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    parts = dict(packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
    return SparseSemiStructuredTensorCUTLASS(weight.shape, **parts)


def assert_dense_again(sparse, output, expected):
    export(ExportOptions.build(model=str(sparse), output_dir=output, to="dense"))
    found = SourceCheckpoint.open(output)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.load(name).dtype == tensor.dtype and torch.equal(found.load(name), tensor), name


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "before-torch-1.6"])
def test_dense_pickles(dense_llama, tmp_path, how):
    tensors = pruned(dense_llama, "unstructured")
    state = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    result = run(save(dense_llama, tmp_path / "model", state, **how), tmp_path / "out")
    assert result["source"]["kind"] == "dense" and result["patterns"] == {"unstructured": 14}
    assert not list((tmp_path / "out").glob("*.bin"))
    assert_dense_again(tmp_path / "out", tmp_path / "dense", tensors)


def test_shards_with_an_index(dense_llama, tmp_path):
    tensors = pruned(dense_llama, "4:8")
    names = list(tensors)
    files = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for file, part in files.items():
        model = save(dense_llama, tmp_path / "model", {name: tensors[name] for name in part}, file)
    (model / "optimizer.pt").write_bytes(b"not looked at")
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert run(model, tmp_path / "out")["patterns"] == {"4:8": 14}
    assert_dense_again(tmp_path / "out", tmp_path / "dense", tensors)
    (model / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FormatError, match="names pytorch_model-00002-of-00003.bin, which is not in"):
        run(model, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_semi_structured_weights(dtype, tmp_path):
    dense = helpers.tiny_llama(tmp_path / "dense", dtype=dtype)
    # The tensor cores have no 2:4 for float32, torch stores 1:2.
    kept = "2:4" if dtype != torch.float32 else "1:2"
    tensors = pruned(dense, kept)
    tensors[NAME][7] = 0  # a row of stored zeros
    state = {name: cutlass(tensor) if "_proj" in name else tensor for name, tensor in tensors.items()}
    model = save(dense, tmp_path / "model", state)
    result = run(model, tmp_path / "out")
    assert result["source"]["kind"] == "semi-structured" and result["patterns"] == {"2:4": 14}
    assert_dense_again(tmp_path / "out", tmp_path / "again", tensors)
    assert inspect(InspectOptions(model=str(model)))["suggestion"].endswith("--method none --pattern 2:4")
    name = NAME.removesuffix(".weight")
    values, metadata = Checkpoint.open(tmp_path / "out").load_weight(name)
    mask = get_format("2:4").unpack_mask(metadata, 160, 64)
    pairs = mask[7].view(-1, 4)  # the positions that torch chose for zeros, not those that we would
    assert pairs.tolist() == [[False, False, True, True]] * 16 or dtype == torch.float32
    assert values[7].count_nonzero() == 0


def test_a_state_dict_of_a_module_saved_on_a_gpu(dense_llama, tmp_path):
    tensors = pruned(dense_llama, "2:4")
    linear = torch.nn.Linear(64, 160, bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(cutlass(tensors[NAME]), requires_grad=False)
    model = save(dense_llama, tmp_path / "model", tensors | {NAME: linear.state_dict()["weight"]}, "cpu.zip")
    with zipfile.ZipFile(model / "cpu.zip") as old, zipfile.ZipFile(model / "model.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"X\x03\x00\x00\x00cpu") >= 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(entry.filename, data)
    (model / "cpu.zip").unlink()
    run(model, tmp_path / "out")
    assert_dense_again(tmp_path / "out", tmp_path / "dense", tensors)


def test_a_tied_head_is_stored_once(tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", "qwen2")
    tensors = pruned(dense, "2:4")
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    run(save(dense, tmp_path / "model", tied), tmp_path / "out")
    assert_dense_again(tmp_path / "out", tmp_path / "again", tensors)
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run(tmp_path / "model", tmp_path / "untied")
    assert_dense_again(tmp_path / "untied", tmp_path / "dense-untied", tied)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_other_object_is_built(dense_llama, tmp_path):
    mark = tmp_path / "ran"
    model = save(dense_llama, tmp_path / "model", {"a": torch.ones(2), "b": Command(f"touch {mark}")})
    with pytest.raises(UserError, match=r"pytorch_model.bin holds an object of \w+\.system, and of a pickle .* only"):
        run(model, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_cusparselt_is_refused_not_guessed(dense_llama, tmp_path):
    blob = torch.zeros(160 * 64 * 9 // 16, dtype=torch.bfloat16)
    parts = dict(packed=blob, meta=None, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
    state = pruned(dense_llama, "2:4") | {NAME: SparseSemiStructuredTensorCUSPARSELT(torch.Size([160, 64]), **parts)}
    with pytest.raises(
        UserError, match=f"{NAME} is stored by cuSPARSELt, .* replace each such weight by weight.to_dens"
    ):
        run(save(dense_llama, tmp_path / "model", state), tmp_path / "out")


def test_damage(dense_llama, tmp_path):
    tensors = pruned(dense_llama, "2:4")
    stored = cutlass(tensors[NAME])

    def refused(state, error, words):
        with pytest.raises(error, match=words):
            run(save(dense_llama, tmp_path / "model", state), tmp_path / "out")

    for change, words in (
        (
            dict(packed=stored.packed[:, :16]),
            r"has packed \(160, 32\) and int16 meta \(160, 4\), the file holds \(160, 16",
        ),
        (dict(meta=None), "is a transposed SparseSemiStructuredTensor, or one of another release"),
        (dict(meta=torch.zeros_like(stored.meta)), "the metadata names a column twice in 2560 groups"),
    ):
        parts = dict(packed=stored.packed, meta=stored.meta, packed_t=None, meta_t=None) | change
        tensor = SparseSemiStructuredTensorCUTLASS(stored.shape, **parts, compressed_swizzled_bitmask=None)
        refused(tensors | {NAME: tensor}, FormatError, words)
    refused([1, 2], UserError, "holds list, not a state dict")
    refused({"model": 3}, UserError, "'model' is int, not a tensor; save model.state_dict")
    model = save(dense_llama, tmp_path / "model", tensors)
    file = model / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(FormatError, match="pytorch_model.bin is no file of torch.save, or damaged"):
        run(model, tmp_path / "out")
    file.rename(model / "first.bin")
    (model / "second.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 pickled files .* name the one with the weights pytorch_model.bin"):
        run(model, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
