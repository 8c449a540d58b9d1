"""A model converted with ARMOR, from the command's options to logits, other formats and refusals."""

import json
import shutil

import pytest
import torch

import helpers
from sparse_rt.benchmarking.models import open_pair
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint, read_json
from sparse_rt.config import (
    BenchOptions,
    ConvertOptions,
    ExportOptions,
    FinetuneOptions,
    InspectOptions,
    MergeOptions,
    VerifyOptions,
)
from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm.folders import open_description
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears
from sparse_rt.workflows.bench import bench, check_wrapper
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export
from sparse_rt.workflows.finetune import finetune
from sparse_rt.workflows.inspect import inspect
from sparse_rt.workflows.merge import merge
from sparse_rt.workflows.verify import verify

REMEDY = "make a dense model of it with `sparse-rt export --to dense`"


def options(source, output, **changes):
    fields = dict(model=str(source), output_dir=output, method="armor", num_samples=2, max_seq_len=32, device="cpu")
    return ConvertOptions.build(**{**fields, "wrapper_block": 8, **changes})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source whose every pass is short: one layer of each kind, and biases."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return helpers.tiny_model(tmp_path_factory.mktemp("small") / "qwen2", "qwen2", num_key_value_heads=1, **shape)


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("armor") / "model"
    return output, convert(options(small, output))


def tokens(rows=2):
    return torch.randint(4096, (rows, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(tokens()).logits.float()


def test_the_folder_is_what_the_dry_run_announced(small, converted, tmp_path):
    folder, result = converted
    announced = convert(options(small, tmp_path / "no", dry_run=True))
    assert announced["compressed_bytes"] == result["compressed_bytes"] == Checkpoint.open(folder).total_bytes
    checkpoint = Checkpoint.open(folder)
    sizes = {m["name"]: m["compressed_bytes"] for m in announced["modules"] if m["pattern"]}
    assert sizes == {name: checkpoint.stored_bytes(name) for name in checkpoint.weights}
    assert checkpoint.weights["model.layers.0.mlp.down_proj"].wrapper == (8, 8)
    assert all(entry.sparsity == 0.5 for entry in checkpoint.weights.values()) and len(checkpoint.weights) == 14
    assert read_json(folder / "sparse_rt.manifest.json")["options"]["wrapper_block"] == 8
    card = (folder / "README.md").read_text()
    assert "| wrapper | block_diagonal |" in card and "vllm serve" not in card and "--to dense" in card
    assert verify(VerifyOptions(model=str(folder)))["ok"]
    described = inspect(InspectOptions(model=str(folder)))
    assert described["wrapper"] == "block_diagonal" and described["weights"][0]["wrapper"] == [8, 8]
    assert any("sparsity is that of the cores" in note for note in described["notes"])


def test_it_errs_less_than_wanda(small, converted, tmp_path):
    wanda = convert(options(small, tmp_path / "wanda", method="wanda", wrapper_block=None))
    assert converted[1]["mean_reconstruction_error"] < 0.9 * wanda["mean_reconstruction_error"]


def test_transformers_runs_core_and_wrapper_as_their_product(converted, tmp_path):
    folder, _ = converted
    model = load(folder, dtype=torch.float32)
    layers = dict(sparse_linears(model))
    assert len(layers) == 14 and all(layer.wrapper is not None for layer in layers.values())
    assert not any(p.requires_grad for layer in layers.values() for p in (layer.values, *layer.wrapper))
    found = logits(model)
    dense = load(folder, dtype=torch.float32, dequantize=True)
    assert not dict(sparse_linears(dense))
    assert torch.allclose(found, logits(dense), atol=1e-4 * float(found.abs().max()))
    # and as saved again by transformers
    own = load(folder)
    own.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").quantization.wrapper == "block_diagonal"
    assert torch.equal(logits(load(tmp_path / "again")), logits(own))
    assert verify(VerifyOptions(model=str(tmp_path / "again"), against=str(folder)))["against"]["values_equal"] == 14


def test_the_dense_export_holds_the_products(converted, tmp_path):
    folder, _ = converted
    done = export(ExportOptions(model=str(folder), output_dir=tmp_path / "dense", to="dense", check=True))
    assert done["check"]["weights_equal"] == 14
    checkpoint, dense = Checkpoint.open(folder), SourceCheckpoint.open(tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj"
    values, metadata, wrapper = checkpoint.load_core(name)
    core = values.new_zeros(48, 32).masked_scatter_(_mask(metadata), values)
    product = torch.block_diag(*wrapper.out.double()) @ core.double() @ torch.block_diag(*wrapper.inner.double())
    assert torch.allclose(dense.load(f"{name}.weight").double(), product, rtol=2**-8, atol=1e-6)
    assert "it has no zeros" in (tmp_path / "dense" / "README.md").read_text()


def _mask(metadata):
    """bool [m, n] of nibbles: first kept column of four in bits 0-1, second in bits 2-3, low nibble first."""
    nibbles = torch.stack([metadata & 15, metadata >> 4], -1).flatten(1)[..., None].int()
    lanes = torch.arange(4)
    return ((nibbles & 3 == lanes) | (nibbles >> 2 == lanes)).flatten(1)


def test_the_next_block_is_calibrated_on_the_product(small, converted, tmp_path):
    """The inputs of the second block are those of the model with the first one wrapped: a run that knows only the
    first block's product as a dense weight finds the same second block."""
    folder, _ = converted
    edited = tmp_path / "edited"
    shutil.copytree(small, edited)
    checkpoint, path = Checkpoint.open(folder), edited / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name in checkpoint.weights:
        if ".layers.0." in name:
            tensors[f"{name}.weight"] = checkpoint.load_dense(name)
    save_file(tensors, path, metadata={"format": "pt"})
    convert(options(edited, tmp_path / "out", ignore=["re:.*layers\\.0\\..*", "lm_head"]))
    again = Checkpoint.open(tmp_path / "out")
    assert len(again.weights) == 7
    for name in again.weights:
        for found, expected in zip(_flat(again, name), _flat(checkpoint, name), strict=True):
            assert torch.equal(found, expected), name


def _flat(checkpoint, name):
    values, metadata, wrapper = checkpoint.load_core(name)
    return values, metadata, *wrapper


def test_a_killed_run_goes_on_to_the_same_bytes(small, converted, tmp_path):
    output = tmp_path / "model"
    chosen = options(small, output, max_shard_size="20kB")
    convert(options(small, tmp_path / "whole", max_shard_size="20kB"))
    helpers.run_until_killed("convert", chosen, after=1, cwd=tmp_path)
    convert(chosen.model_copy(update={"resume": True}))
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (output / file.name).read_bytes()


def test_reconstruction_trains_the_core(small, tmp_path):
    result = convert(options(small, tmp_path / "model", reconstruct=6))
    assert result["mean_block_error_after"] < result["mean_block_error_before"]
    assert Checkpoint.open(tmp_path / "model").quantization.wrapper == "block_diagonal"


@pytest.mark.parametrize(
    "target,message",
    [
        ("int8", "int8 values cannot stand for wrapped weights"),
        ("compressed-tensors", "compressed-tensors has no place for wrapped weights"),
        ("onnx", "the ONNX export has no operator for wrapped weights"),
        ("vllm", "vLLM cannot serve wrapped weights"),
    ],
)
def test_other_formats_have_no_place_for_a_wrapper(converted, tmp_path, target, message):
    with pytest.raises(UserError, match=f"{message}.*{REMEDY}"):
        export(ExportOptions(model=str(converted[0]), output_dir=tmp_path / "out", to=target))
    assert not (tmp_path / "out").exists()


def test_the_vllm_plugin_refuses_such_a_config(converted):
    config = json.loads((converted[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises(UserError, match="sparse_rt: vLLM cannot serve wrapped weights"):
        open_description(config)


def test_adapters_are_refused_before_any_work(converted, tmp_path):
    folder = str(converted[0])
    with pytest.raises(UserError, match="no adapter can be trained on wrapped weights"):
        finetune(FinetuneOptions(model=folder, output_dir=tmp_path / "adapter"))
    with pytest.raises(UserError, match="no adapter can be merged into wrapped weights"):
        merge(MergeOptions(model=folder, adapter=str(tmp_path), output_dir=tmp_path / "merged"))
    from peft import get_peft_model

    import sparse_rt

    with pytest.raises(UserError, match=r"spp adapts kept values, and .*q_proj is a product of three matrices"):
        get_peft_model(load(folder), sparse_rt.SPPConfig(groups=2))


def test_bench_leaves_training_out_and_refuses_what_was_asked_for(converted):
    chosen = dict(model=str(converted[0]), engine=["hf"])
    with open_pair(chosen["model"], None) as pair:
        phases = ["disk", "decode", "train"]
        (note,) = check_wrapper(pair, BenchOptions.build(**chosen), phases)
    assert "no training step: the model has wrapped weights" in note and phases == ["disk", "decode"]
    with pytest.raises(UserError, match="--phase train: no adapter can be trained on wrapped weights"):
        bench(BenchOptions.build(**chosen, phase=["train"]))
    with pytest.raises(UserError, match="--engine onnx cannot run wrapped weights"):
        bench(BenchOptions.build(**{**chosen, "engine": ["onnx"]}))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(pattern="unstructured"), "--method armor cannot prune to unstructured: it tries every choice"),
        (dict(overrides={"down_proj": "16:32"}), "--method armor cannot prune to 16:32"),
        (dict(method="wanda"), "--wrapper-block is for --method armor, not for wanda"),
        (dict(transposable=True), "--method armor chooses single positions within their row"),
        (dict(method="armor+dsnot"), "which no repair knows; use armor alone"),
    ],
)
def test_options_that_cannot_work_are_refused(small, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        convert(options(small, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
