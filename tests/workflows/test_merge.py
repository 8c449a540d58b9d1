"""``merge``: the same mask, the same logits, proved before anything appears."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt import MaskLoRAConfig, SPPConfig, ValuesConfig
from sparse_rt.checkpoint import Checkpoint, file_digest, read_json
from sparse_rt.config import MergeOptions
from sparse_rt.errors import CheckFailed, FormatError, UserError
from sparse_rt.hf.load import load
from sparse_rt.training.digest import base_digest
from sparse_rt.workflows import merge as workflow
from sparse_rt.workflows.merge import merge

TOKENS = torch.arange(24).reshape(2, 12)
CONFIGS = {
    "spp": SPPConfig,
    "masklora": MaskLoRAConfig,
    "values": ValuesConfig,
    "exact": lambda: SPPConfig(exact=True, dropout=0.1),
}


def make_adapter(base, folder, config, scale=0.3, **options):
    """Save an adapter that does something, as `finetune` leaves it."""
    torch.manual_seed(1)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(part in name for part in ("_B.", "_delta.", "modules_to_save")):
                parameter.normal_(std=scale)
    model.peft_config["default"].base_digest = base_digest(Checkpoint.open(base))
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return helpers.tiny_llama(tmp_path_factory.mktemp("merge") / "dense")


@pytest.fixture(scope="module")
def base(dense, tmp_path_factory):
    return helpers.compress_folder(dense, tmp_path_factory.mktemp("merge") / "base", "2:4")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "spp", SPPConfig(task_type="CAUSAL_LM"))


@pytest.fixture
def options(base, adapter, tmp_path):
    def make(**changes):
        return MergeOptions.build(
            **{"model": str(base), "adapter": str(adapter), "output_dir": tmp_path / "out", **changes}
        )

    return make


@pytest.mark.parametrize(
    "kind, pattern", [("spp", "2:4"), ("masklora", "unstructured"), ("values", "2:4"), ("exact", "4:8")]
)
def test_mask_and_logits_are_those_of_base_and_adapter(dense, options, tmp_path, kind, pattern):
    base = helpers.compress_folder(dense, tmp_path / "base", pattern)
    adapter = make_adapter(base, tmp_path / "adapter", CONFIGS[kind]())
    result = merge(options(model=str(base), adapter=str(adapter)))
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert before.weights.keys() == after.weights.keys() and before.tensors.keys() == after.tensors.keys()
    for name in before.weights:
        (values, metadata), (merged, same) = before.load_weight(name), after.load_weight(name)
        assert torch.equal(metadata, same) and not torch.equal(values, merged) and values.dtype == merged.dtype
    for name in before.dense_tensors():
        assert torch.equal(before.load(name), after.load(name))
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    found = logits(load(tmp_path / "out"))
    if kind == "exact":
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)
    else:
        assert torch.equal(found, expected) and result["logits_error"] == 0
    assert not torch.equal(expected, logits(load(base)))
    assert result["adapter_effect"] > 0 and result["merged_weights"] == result["weights"] == 14
    assert 50 < result["changed_values_percent"] <= 100 and result["notes"] == [] and json.dumps(result)


def test_the_folder_is_a_whole_model(base, adapter, options, tmp_path):
    merge(options(max_shard_size="100kB"))
    out = tmp_path / "out"
    manifest = read_json(out / "sparse_rt.manifest.json")
    assert manifest["source"]["manifest_sha256"] == file_digest(base / "sparse_rt.manifest.json")
    assert manifest["source"]["adapter_sha256"] == file_digest(adapter / "adapter_model.safetensors")
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "config.json"} <= {p.name for p in out.iterdir()}
    assert len(list(out.glob("sparse_rt-*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_of_the_merged_model(base, options, tmp_path, dtype):
    result = merge(options(dtype=dtype))
    merged = Checkpoint.open(tmp_path / "out")
    assert {entry.dtype for entry in merged.tensors.values()} == {getattr(torch, dtype), torch.uint8}
    assert load(tmp_path / "out").dtype == getattr(torch, dtype)
    assert result["logits_error"] <= {"float32": 1e-6, "float16": 2e-3}[dtype]
    again = merge(options(model=str(tmp_path / "out"), output_dir=tmp_path / "twice", verify=False))
    assert again["notes"][0].startswith("the adapter was trained on other weights")


def test_modules_saved_as_a_whole_replace_those_of_the_base(base, options, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", SPPConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    result = merge(options(adapter=str(adapter)))
    assert result["merged_weights"] == 2 and result["logits_error"] == 0
    merged, plain = load(tmp_path / "out"), load(base)
    assert not torch.equal(merged.model.norm.weight, plain.model.norm.weight)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.values, plain.model.layers[0].mlp.up_proj.values)


def damaged(adapter, folder, change):
    """A copy of ``adapter`` whose tensors went through ``change``."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda t: t[min(t)].view(-1)[3].fill_(float("nan")), FormatError, "holds nan at position"),
        (lambda t: t.pop(min(t)), UserError, "has nothing for spp_A of model.layers.0.mlp.down_proj"),
        (
            lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up" in k],
            FormatError,
            "lacks model.layers.1.mlp.up_proj",
        ),
        (lambda t: t.update({min(t): t[min(t)][:8]}), UserError, r"has \(8, 160\) for spp_A .* expected \(16, 160\)"),
        (lambda t: t.update({"base_model.model.extra.weight": torch.ones(2)}), UserError, "extra.weight"),
    ],
    ids=["nan", "one tensor missing", "layer missing", "other shape", "unknown tensor"],
)
def test_a_damaged_adapter_is_refused(adapter, options, tmp_path, change, error, words):
    folder = damaged(adapter, tmp_path / "damaged", change)
    with pytest.raises(error, match=words):
        merge(options(adapter=str(folder)))
    assert not (tmp_path / "out").exists()


def test_a_truncated_adapter_is_refused(adapter, options, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: truncated"):
        merge(options(adapter=str(folder)))


def test_what_is_no_adapter_of_ours_is_refused(base, dense_llama, options, tmp_path):
    with pytest.raises(UserError, match=r"it has no adapter_config\.json"):
        merge(options(adapter=str(base)))
    get_peft_model(load(dense_llama), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="of the type LORA, which does not keep the mask; known are .*spp"):
        merge(options(adapter=str(tmp_path / "lora")))
    with pytest.raises(FormatError, match="quant_method"):
        merge(options(model=str(dense_llama)))


def test_another_base_is_refused_unless_forced(options, tmp_path):
    other = helpers.compress_folder(helpers.tiny_llama(tmp_path / "dense", seed=5), tmp_path / "other", "2:4")
    with pytest.raises(UserError, match="trained on other weights .* --no-verify to merge all the same"):
        merge(options(model=str(other)))
    assert not (tmp_path / "out").exists()
    notes = merge(options(model=str(other), verify=False))["notes"]
    assert "trained on other weights" in notes[0] and "was not compared" in notes[1]


def test_an_overflow_in_the_chosen_dtype_fails_the_check(base, options, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", MaskLoRAConfig(), scale=1e6)
    with pytest.raises(CheckFailed, match="gives NaN or Inf in .* as float16; nothing was written") as failure:
        merge(options(adapter=str(adapter), dtype="float16"))
    assert failure.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_a_wrong_merge_is_noticed_and_not_published(options, tmp_path, monkeypatch):
    def forget_the_adapter(checkpoint, adapter, name, dtype):
        return *checkpoint.load_weight(name), 0, 0

    monkeypatch.setattr(workflow, "_merged", forget_the_adapter)
    with pytest.raises(CheckFailed, match="logits differ from base \\+ adapter by"):
        merge(options())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_mask_is_noticed_and_not_published(options, base, tmp_path, monkeypatch):
    honest = workflow._merged

    def flip(checkpoint, adapter, name, dtype):
        values, metadata, *counts = honest(checkpoint, adapter, name, dtype)
        return values, metadata.roll(1, 0), *counts

    monkeypatch.setattr(workflow, "_merged", flip)
    with pytest.raises(CheckFailed, match="the mask of .* is not that of the base model"):
        merge(options())
    assert list(tmp_path.iterdir()) == []


def test_an_update_below_the_rounding_is_reported(base, options, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", SPPConfig(exact=True), scale=1e-3)
    assert "--dtype float32" in merge(options(adapter=str(adapter)))["notes"][0]
    assert merge(options(adapter=str(adapter), dtype="float32", output_dir=tmp_path / "wide"))["notes"] == []


def test_bad_output_and_dtype_are_refused(base, adapter, options, tmp_path):
    with pytest.raises(UserError, match="not empty"):
        merge(options(output_dir=base))
    with pytest.raises(UserError, match="holds the source model"):
        merge(options(output_dir=base, overwrite=True))
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        merge(options(dtype="int8"))


@pytest.mark.slow
def test_kill_9_leaves_no_half_model(options, tmp_path):
    helpers.run_until_killed("merge", options(), after=5, cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    assert merge(options())["logits_error"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
