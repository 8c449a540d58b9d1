"""The int8 export: what is written, what the check sees, and what the other commands make of such a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, SourceCheckpoint, file_digest, read_header, read_json
from sparse_rt.config import ExportOptions, InspectOptions, MergeOptions, VerifyOptions
from sparse_rt.errors import CheckFailed, FormatError, UserError
from sparse_rt.exporters import int8
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import quantize
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears
from sparse_rt.tools.cli import main
from sparse_rt.training.digest import base_digest
from sparse_rt.workflows.export import export
from sparse_rt.workflows.finetune import finetune
from sparse_rt.workflows.inspect import inspect
from sparse_rt.workflows.merge import merge
from sparse_rt.workflows.verify import verify

LAYER = "model.layers.1.mlp.down_proj"


def exported(source, output, to="int8", **options):
    return export(ExportOptions.build(model=str(source), output_dir=output, to=to, **options))


@pytest.fixture(scope="module")
def plain(dense_llama, tmp_path_factory):
    return helpers.compress_folder(dense_llama, tmp_path_factory.mktemp("int8") / "plain", "unstructured", 0.6)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    exported(plain, root / "int8")
    return root / "int8"


@pytest.mark.parametrize("pattern, group_size", [("2:4", 64), ("unstructured", None), ("4:8", 256)])
def test_command_line_then_transformers(tmp_path, pattern, group_size):
    source = helpers.compress_folder(assets.model_dir(), tmp_path / "plain", pattern)
    arguments = ["export", source, "--to", "int8", "-o", tmp_path / "int8", "--check", "--json", tmp_path / "result"]
    arguments += ["--options", f"group_size={'null' if group_size is None else group_size}"]
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 0
    result = json.loads((tmp_path / "result").read_text())
    assert result["facts"]["values"] == "int8" and result["facts"]["group_size"] == group_size
    figures = result["check"]
    assert figures["weights"] == 35 and 0.49 < figures["largest_error_in_scales"] <= int8.HALF_STEP
    assert 0 < figures["logits_error"] < 0.02 and figures["greedy_agreement"] > 0.95
    assert abs(figures["perplexity"] / figures["source_perplexity"] - 1) < 0.01
    model, checkpoint = load(tmp_path / "int8"), Checkpoint.open(tmp_path / "int8")
    for name, module in sparse_linears(model):
        assert torch.equal(module.values, checkpoint.load_weight(name)[0])


def test_folder_holds_integers_scales_and_the_same_masks(plain, folder):
    source, written = Checkpoint.open(plain), Checkpoint.open(folder)
    assert source.weights.keys() == written.weights.keys()
    for name, entry in source.weights.items():
        values, metadata = source.load_weight(name)
        expected = *quantize(get_format(entry.pattern), values, metadata, entry.m, entry.n, 128), metadata
        for found, tensor in zip(written.load_quantized(name), expected, strict=True):
            assert torch.equal(found, tensor)
        assert written.weights[name].dtype == entry.dtype
    for name in source.dense_tensors():
        assert torch.equal(source.load(name), written.load(name))
    assert (written.quantization.values, written.quantization.group_size) == ("int8", 128)


def test_manifest_and_card_say_what_it_was_made_from(plain, folder):
    manifest = read_json(folder / MANIFEST_NAME)
    assert manifest["source"]["kind"] == "int8"
    assert manifest["source"]["manifest_sha256"] == file_digest(plain / MANIFEST_NAME)
    assert manifest["options"] == {"group_size": 128} and "parent" in manifest
    assert {"tokenizer.json", "README.md", "config.json"} <= manifest["files"].keys()
    assert "128 columns of a row" in (folder / "README.md").read_text()


def test_bytes_are_those_that_are_stored(plain, folder, tmp_path):
    written = Checkpoint.open(folder)
    entry = written.weights[LAYER]
    stored = entry.nnz + entry.m * 2 * 4 + entry.m * entry.n // 8
    (weight,) = (w for w in inspect(InspectOptions(model=str(folder)))["weights"] if w["name"] == LAYER)
    assert weight["bytes"] == stored == written.stored_bytes(LAYER)
    assert weight["values"] == "int8" and weight["dtype"] == "bfloat16"
    assert weight["dense_bytes"] == 2 * entry.m * entry.n
    totals = inspect(InspectOptions(model=str(folder)))["totals"]
    dense = inspect(InspectOptions(model=str(plain)))["totals"]["dense_bytes"]
    assert totals["dense_bytes"] == dense and totals["bytes"] == written.total_bytes
    again = exported(folder, tmp_path / "copy", to="vllm")
    assert again["dense_bytes"] == dense and again["source_bytes"] == written.total_bytes


def test_verify_reads_every_byte(plain, folder, tmp_path):
    result = verify(VerifyOptions(model=str(folder), against=str(plain)))
    assert result["ok"] and result["against"]["masks"]["identical"] == 14
    assert 0 < result["against"]["max_abs_difference"] < 0.01
    damaged = tmp_path / "damaged"
    exported(folder, damaged, to="vllm")
    (file,) = damaged.glob("*.safetensors")
    tensors, metadata = load_file(file), read_header(file).metadata
    file.unlink()  # it is a link to the good one
    tensors[f"{LAYER}.weight_scale"][3, 1] = -1.0
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(FormatError, match=rf"{LAYER}.weight_scale .*sha256 differs"):
        verify(VerifyOptions(model=str(damaged)))
    (damaged / MANIFEST_NAME).unlink()
    with pytest.raises(FormatError, match=rf"{LAYER}.weight_scale holds -1.0 at row 3, group 1"):
        verify(VerifyOptions(model=str(damaged)))


@pytest.mark.parametrize("to", ["dense", "compressed-tensors"])
def test_other_exports_hold_the_widened_values(folder, tmp_path, to):
    exported(folder, tmp_path / "out", to=to, check=True)
    written = SourceCheckpoint.open(tmp_path / "out")
    assert not any(name.endswith("weight_scale") for name in written.tensors)
    if to == "dense":
        checkpoint = Checkpoint.open(folder)
        entry = checkpoint.weights[LAYER]
        dense = get_format(entry.pattern).decompress(*checkpoint.load_weight(LAYER), entry.m, entry.n)
        assert torch.equal(written.load(f"{LAYER}.weight"), dense)


def test_quantizing_twice_and_unknown_groups_are_refused(plain, folder, tmp_path):
    with pytest.raises(UserError, match="has int8 values already, and quantizing twice only loses more"):
        exported(folder, tmp_path / "out")
    with pytest.raises(UserError, match="option group_size: group_size 100 is unknown; allowed are 64, 128, 256"):
        exported(plain, tmp_path / "out", options={"group_size": 100})
    assert not list(tmp_path.iterdir())


def wrong_value(tensors):
    tensors[f"{LAYER}.weight_values"][5] += 1


def wrong_dense(tensors):
    tensors["model.norm.weight"][0] += 1


@pytest.mark.parametrize(
    "change, message",
    [(wrong_value, f"{LAYER}: 1 of 4096 values are more than half a scale off"), (wrong_dense, "model.norm.weight")],
)
def test_check_sees_one_wrong_number(plain, tmp_path, change, message):
    exported(plain, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors, metadata = load_file(file), read_header(file).metadata
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckFailed, match=message):
        Int8Exporter().check(plain, tmp_path / "out")


def test_check_sees_another_mask(plain, dense_llama, tmp_path):
    other = helpers.compress_folder(dense_llama, tmp_path / "other", "unstructured", 0.59)
    exported(other, tmp_path / "out")
    with pytest.raises(CheckFailed, match="the mask differs from the source"):
        Int8Exporter().check(plain, tmp_path / "out")


def test_logits_that_are_too_far_off_fail_with_the_figures(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "LIMIT", 1e-6)
    with pytest.raises(CheckFailed, match="logits of the int8 model differ .*try --options group_size=64") as caught:
        exported(plain, tmp_path / "out", check=True)
    assert caught.value.result["check"]["logits_error"] > 1e-6


def test_a_folder_without_tokenizer_is_checked_on_random_tokens(plain, tmp_path):
    bare = tmp_path / "bare"
    exported(plain, bare, to="vllm")
    for file in bare.glob("token*"):
        file.unlink()
    figures = exported(bare, tmp_path / "out", check=True)["check"]
    assert "perplexity" not in figures and figures["logits_error"] < int8.LIMIT


def test_compressed_experts_are_checked_with_dense_ones(tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", "qwen3_moe")
    plain = helpers.compress_folder(dense, tmp_path / "plain", "2:4")
    figures = exported(plain, tmp_path / "out", check=True)["check"]
    assert figures["logits_error"] < int8.LIMIT and figures["weights"] > 40


def test_an_adapter_is_trained_on_widened_values_and_merged_into_plain_ones(folder, tmp_path):
    finetune(helpers.short_run(folder, assets.finetune_jsonl(), tmp_path / "adapter", {"learning_rate": 0.05}))
    trained_on = read_json(tmp_path / "adapter" / "adapter_config.json")["base_digest"]
    assert trained_on == base_digest(Checkpoint.open(folder))
    options = dict(model=str(folder), adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "merged")
    result = merge(MergeOptions.build(**options))
    # float32 and float64 may round a value that lies near a tie to neighbours.
    assert result["mask"] == "identical" and result["logits_error"] < 0.005 < result["adapter_effect"]
    assert any("plain ones; `sparse-rt export --to int8` quantizes them again" in note for note in result["notes"])
    merged = Checkpoint.open(tmp_path / "merged")
    assert merged.quantization.values == "plain" and merged.quantization.group_size is None
    assert not any(name.endswith("weight_scale") for name in merged.tensors)
    verify(VerifyOptions(model=str(tmp_path / "merged")))
    exported(tmp_path / "merged", tmp_path / "again", options={"group_size": None})


def test_another_base_of_the_same_masks_has_another_digest(plain, folder):
    assert base_digest(Checkpoint.open(plain)) != base_digest(Checkpoint.open(folder))
