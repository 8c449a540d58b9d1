"""A compressed folder is an ordinary transformers model: load, save, dequantize, offload, train only through PEFT."""

import shutil
import subprocess
import sys

import pytest
import torch

from helpers import compress_folder, edit_config, tiny_model
from sparse_rt import SparseLinear
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.errors import FormatError
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.hf.quantizer import SparseRTQuantizer
from sparse_rt.nn import sparse_linears

IDS = torch.arange(5, 29).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def dense_reference(sparse_folder, dense_folder):
    """The dense model with the weights of ``sparse_folder`` written into it, loaded by plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype="auto").eval()
    checkpoint = Checkpoint.open(sparse_folder)
    for name, entry in checkpoint.weights.items():
        weight = get_format(entry.pattern).decompress(*checkpoint.load_weight(name), entry.m, entry.n)
        model.get_submodule(name).weight.data.copy_(weight)
    return model


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


def test_loaded_model_equals_the_dense_model_with_the_same_weights(sparse_llama, dense_llama):
    model = load(sparse_llama)
    assert len(list(sparse_linears(model))) == 14
    assert torch.equal(logits(model), logits(dense_reference(sparse_llama, dense_llama)))
    frozen = [p for n, p in model.named_parameters() if "weight_" in n]
    assert len(frozen) == 28 and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "opt"])
def test_other_families_with_biases_and_tied_embeddings(family, tmp_path):
    dense = tiny_model(tmp_path / "dense", family)
    sparse = compress_folder(dense, tmp_path / "sparse", "2:4")
    model = load(sparse)
    assert torch.equal(logits(model), logits(dense_reference(sparse, dense)))
    if family in ("qwen2", "qwen3"):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("hook", ["update_tp_plan", "update_attn_implementation"])
def test_either_hook_that_a_release_of_transformers_calls_finds_the_files(sparse_llama, hook, monkeypatch):
    """Up to 5.17 only the first is called, from 5.21 on only the second."""
    (other,) = {"update_tp_plan", "update_attn_implementation"} - {hook}
    monkeypatch.setattr(SparseRTQuantizer, other, lambda self, config: config)
    called = []
    before = getattr(SparseRTQuantizer, hook)
    monkeypatch.setattr(SparseRTQuantizer, hook, lambda self, config: called.append(hook) or before(self, config))
    try:
        model = load(sparse_llama)
    except OSError:
        assert not called, "the hook was called and the files were not found"
    else:
        assert called and len(list(sparse_linears(model))) == 14


def test_save_pretrained_round_trip_is_bit_equal(sparse_llama, tmp_path):
    model = load(sparse_llama)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    first, second = Checkpoint.open(sparse_llama), Checkpoint.open(tmp_path / "saved")
    assert first.tensors.keys() == second.tensors.keys() and first.quantization == second.quantization
    for name in first.tensors:
        assert torch.equal(first.load(name), second.load(name)), name
    assert not second.config.get("transformers_weights"), "the guard's file name must not stick to a standard folder"


def test_dequantize_gives_an_ordinary_model(sparse_llama, tmp_path):
    model = load(sparse_llama)
    expected = logits(model)
    dense = load(sparse_llama, dequantize=True)
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert torch.equal(logits(dense), expected)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in SourceCheckpoint.open(tmp_path / "dense").config
    assert torch.equal(logits(load(tmp_path / "dense")), expected)


def test_explicit_dtype_casts_values_and_keeps_the_mask(sparse_llama):
    model = load(sparse_llama, dtype=torch.float16)
    stored = Checkpoint.open(sparse_llama)
    for name, module in sparse_linears(model):
        values, metadata = stored.load_weight(name)
        assert module.values.dtype == torch.float16 and torch.equal(module.values, values.half())
        assert module.metadata.dtype == torch.uint8 and torch.equal(module.metadata, metadata)
    assert torch.isfinite(logits(model)).all()


def test_offload_to_disk_gives_the_same_logits(sparse_llama, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(sparse_llama, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.down_proj.weight_values.is_meta
    assert torch.equal(logits(model), logits(load(sparse_llama)))


@pytest.mark.parametrize("first", ["sparse_rt", "transformers"])
def test_either_import_order(sparse_llama, first, tmp_path):
    imports = {"sparse_rt": "import sparse_rt", "transformers": "from transformers import AutoModelForCausalLM"}
    order = [imports.pop(first), *imports.values()]
    code = "; ".join([*order, f"m = AutoModelForCausalLM.from_pretrained({str(sparse_llama)!r})"])
    done = run(code + "; print(type(m.model.layers[0].mlp.up_proj).__name__)", tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "SparseLinear", done.stderr[-2000:]


def test_plain_transformers_without_our_import_fails_loudly(sparse_llama, tmp_path):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(sparse_llama)!r})"
    done = run(code, tmp_path)
    assert done.returncode != 0 and "model.safetensors" in done.stderr


def test_damage_is_refused_at_load_with_the_tensors_name(sparse_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    from sparse_rt.checkpoint import read_header

    folder = shutil.copytree(sparse_llama, tmp_path / "model")
    path = next(folder.glob("sparse_rt-*.safetensors"))
    tensors, metadata = load_file(path), read_header(path).metadata
    name = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight_values"))
    tensors[name].view(-1)[7] = float("inf")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight_values holds inf"):
        load(folder)


def test_config_that_does_not_fit_the_weights_is_refused(sparse_llama, tmp_path):
    import json

    folder = shutil.copytree(sparse_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(FormatError, match=r"weight model.layers.0.mlp.(down|gate|up)_proj is \(.*config and weights"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    edit_config(folder, ignore=[])
    with pytest.raises(FormatError, match="lm_head.weight_values is missing.*only a dense weight is stored"):
        load(folder)


def test_trainer_refuses_a_bare_compressed_model(sparse_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    with pytest.raises(ValueError, match="quantized"):
        Trainer(load(sparse_llama), TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True))


@pytest.mark.parametrize("family,prefix", [("mixtral", None), ("qwen2", "model.")])
def test_another_dtype_is_that_of_every_parameter(tmp_path, family, prefix):
    """Also of those that the file calls otherwise: Mixtral's blocks, and the body of a model without its head."""
    dense = tiny_model(tmp_path / "dense", family)
    if prefix:
        from safetensors.torch import load_file, save_file

        tensors = load_file(dense / "model.safetensors")
        save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, dense / "model.safetensors")
    model = load(compress_folder(dense, tmp_path / "sparse", "2:4"), dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    half = load(tmp_path / "sparse")
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {torch.bfloat16}
    for (name, module), (_, other) in zip(sparse_linears(model), sparse_linears(half), strict=True):
        assert torch.equal(module.values, other.values.float()), name
    assert torch.isfinite(logits(model)).all()
