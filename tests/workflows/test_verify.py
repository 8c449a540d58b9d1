"""verify: any damage is refused by the name of the tensor, and --against tells the same model from another."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint
from sparse_rt.config import ConvertOptions, VerifyOptions
from sparse_rt.errors import CheckFailed, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.verify import verify

DOWN = "model.layers.1.mlp.down_proj"  # 164 columns: 41 groups, so the last byte of a row holds a padding nibble


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and its conversions, in several shards."""
    folder = tmp_path_factory.mktemp("verify")
    dense = helpers.tiny_llama(folder / "dense", intermediate_size=164)
    made = {"dense": dense}
    for name, options in {
        "2:4": {},
        "half": {"pattern": "unstructured"},
        "most": {"pattern": "unstructured", "sparsity": 0.7},
    }.items():
        output = folder / name.replace(":", "-")
        fields = {"model": str(dense), "output_dir": output, "method": "magnitude", "max_shard_size": "300kB"}
        convert(ConvertOptions.build(**fields, **options))
        made[name] = output
    return made


def check(model, against=None):
    return verify(VerifyOptions(model=str(model), against=against and str(against)))


@pytest.fixture
def copy(models, tmp_path):
    def make(name, manifest=True):
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models[name], target)
        if not manifest:
            (target / MANIFEST_NAME).unlink()
        return target

    return make


def edit(folder, name, change, new_name=None):
    """Change one tensor of a shard in place; None drops it. The index is kept in step unless a tensor vanishes."""
    file = Checkpoint.open(folder).tensors[name].file
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata=metadata)


def poke(value, *place):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def flip_first_bit(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] ^= 1
    return tensor


def test_whole_models_pass(models, sparse_llama):
    for name in ("2:4", "half"):
        result = check(models[name])
        assert result["ok"] and result["manifest"] and result["weights"] == 14 and result["notes"] == []
        assert result["files"] == len(list(models[name].iterdir())) - 2  # index and manifest list, they are not listed
        json.dumps(result)


def test_save_pretrained_folders_have_no_manifest(sparse_llama, tmp_path):
    load(sparse_llama).save_pretrained(tmp_path / "saved")
    result = check(tmp_path / "saved", against=sparse_llama)
    assert result["ok"] and not result["manifest"] and "digests were not checked" in result["notes"][0]
    assert result["against"]["masks"]["identical"] == result["against"]["values_equal"] == 14


@pytest.mark.parametrize(
    "model,name,change,words",
    [
        ("2:4", f"{DOWN}.weight_meta", poke(0, 0, 0), "row 0, group 0 keeps columns 0 and 0"),
        ("2:4", f"{DOWN}.weight_meta", poke(0xF4, 2, -1), "padding bits of row 2 are not zero"),
        ("half", f"{DOWN}.weight_bitmask", flip_first_bit, "weight_bitmask marks .* kept weights, weight_values holds"),
        ("half", f"{DOWN}.weight_bitmask", poke(0xFF, 2, -1), "padding bits of row 2 are not zero"),
        ("half", f"{DOWN}.weight_values", poke(float("nan"), 7), r"weight_values holds nan at position \(7,\)"),
        ("2:4", "model.norm.weight", poke(float("inf"), 3), r"model.norm.weight holds inf at position \(3,\)"),
    ],
)
def test_damaged_data_is_named_with_and_without_a_manifest(copy, model, name, change, words):
    with_manifest, without = copy(model), copy(model, manifest=False)
    for folder in (with_manifest, without):
        edit(folder, name, change)
    with pytest.raises(FormatError, match=f"tensor {name} in .* is not what was written: its sha256 differs"):
        check(with_manifest)
    with pytest.raises(FormatError, match=words) as raised:
        check(without)
    assert name.rpartition(".")[0] in str(raised.value)


def test_a_flipped_position_that_stays_legal_is_found_by_its_digest(copy):
    """Nothing but the manifest can tell: the nibble still names two columns in order."""
    folder = copy("2:4")
    edit(folder, f"{DOWN}.weight_meta", lambda meta: torch.where(meta & 15 == 0b0100, meta ^ 0b1100, meta))
    with pytest.raises(FormatError, match=f"tensor {DOWN}.weight_meta in .* is not what was written"):
        check(folder)
    (folder / MANIFEST_NAME).unlink()
    assert check(folder)["ok"]


def test_damaged_files_are_named(copy):
    truncated = copy("2:4")
    shard = Checkpoint.open(truncated).tensors[f"{DOWN}.weight_values"].file
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(FormatError, match=rf"{shard.name}: truncated: tensor model\.\S+ ends at byte"):
        check(truncated)
    missing = copy("2:4")
    edit(missing, f"{DOWN}.weight_values", lambda tensor: None)
    with pytest.raises(FormatError, match=f"tensor {DOWN}.weight_values is missing"):
        check(missing)
    version = copy("2:4")
    helpers.edit_config(version, format_version=7)
    with pytest.raises(FormatError, match="format_version 7, this build reads 1"):
        check(version)
    edited = copy("2:4")
    (edited / "generation_config.json").write_text("{}")
    (edited / "README.md").write_text("my model")
    with pytest.raises(FormatError, match=r"file generation_config.json has 2 bytes, the manifest says \d+"):
        check(edited)
    shutil.copy(copy("2:4") / "generation_config.json", edited)
    assert "README.md has 8 bytes" in check(edited)["notes"][0]
    (edited / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="file tokenizer.json is missing"):
        check(edited)
    extra = copy("2:4")
    save_file({"x": torch.ones(1)}, extra / "old.safetensors")
    with pytest.raises(FormatError, match="extra weight file old.safetensors"):
        check(extra)
    unlisted = copy("2:4")
    manifest = json.loads((unlisted / MANIFEST_NAME).read_text())
    manifest["weights"][DOWN]["nnz"] += 1
    (unlisted / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=f"weight {DOWN} has nnz 5248, the manifest says 5249"):
        check(unlisted)


def test_config_and_tensors_must_fit(copy, sparse_llama, tmp_path):
    smaller = copy("2:4", manifest=False)
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    with pytest.raises(FormatError, match=r"tensor \S+mlp\.\S+ has shape \((164, 64|64, 164)\), config.json announces"):
        check(smaller)
    load(sparse_llama).save_pretrained(tmp_path / "saved")  # one file without an index: nothing else lists its tensors
    edit(tmp_path / "saved", "model.layers.0.input_layernorm.weight", lambda tensor: None)
    with pytest.raises(FormatError, match="tensor model.layers.0.input_layernorm.weight is missing"):
        check(tmp_path / "saved")


def test_against_the_model_it_was_pruned_from(models):
    found = check(models["2:4"], models["dense"])["against"]
    assert found["masks"] == {"identical": 0, "same count": 0, "subset": 14, "different": 0}
    assert found["values_equal"] == 14 and found["max_abs_difference"] == 0
    assert found["other_tensors"] == {"compared": 7, "different": []}


def test_against_another_pruning_of_it(models, copy):
    found = check(models["2:4"], models["half"])["against"]  # 2:4 and 50%: as many, elsewhere
    assert found["masks"]["same count"] == 14
    with pytest.raises(CheckFailed, match=r"and 13 more keeps another number of weights than in") as raised:
        check(models["most"], models["half"])
    assert raised.value.result["against"]["masks"]["subset"] == 14 and not raised.value.result["ok"]
    assert raised.value.exit_code == 3
    with pytest.raises(CheckFailed):
        check(models["half"], models["most"])
    tuned = copy("2:4", manifest=False)
    edit(tuned, f"{DOWN}.weight_values", lambda values: values + 0.5)
    found = check(tuned, models["2:4"])["against"]
    assert found["masks"]["identical"] == 14 and found["values_equal"] == 13
    assert found["weights"][DOWN]["max_abs_difference"] == pytest.approx(0.5, abs=0.01)


def test_against_the_same_zeros_stored_dense(models, tmp_path):
    """Nonzeros stand in for the mask that a dense folder does not have; explicit zeros do not make a difference."""
    source = tmp_path / "zeros"
    shutil.copytree(models["dense"], source)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "_proj" in name:
            mask = get_format("2:4").mask_from_scores(tensors[name].float().abs())
            mask[0] = False
            tensors[name] = torch.where(mask, tensors[name], 0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(ConvertOptions.build(model=str(source), output_dir=tmp_path / "out", method="none"))
    found = check(tmp_path / "out", source)["against"]
    assert found["masks"]["identical"] == 14 and found["values_equal"] == 14


def test_models_that_cannot_be_compared(models, tmp_path):
    other = helpers.tiny_llama(tmp_path / "other", hidden_size=32)
    with pytest.raises(UserError, match=r"has shape \(64, 164\) here and \(32, 160\) there|has shape"):
        check(models["2:4"], other)
    opt = helpers.tiny_model(tmp_path / "opt", "opt")
    with pytest.raises(UserError, match="cannot be compared: tensor .* is missing"):
        check(models["2:4"], opt)
    with pytest.raises(FormatError, match="make one with `sparse-rt convert`"):
        check(models["dense"])
