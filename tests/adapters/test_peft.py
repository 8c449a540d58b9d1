"""The adapters through PEFT's own interface, as its users call it."""

import enum
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors import safe_open

import sparse_rt
from sparse_rt.adapters import peft_hooks
from sparse_rt.adapters.registry import adapter_names, get_adapter
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load
from sparse_rt.nn import SparseLinear, sparse_linears

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(params=adapter_names())
def config_cls(request):
    return get_adapter(request.param).config_cls


def randomize(model, adapter="default"):
    """Make a fresh adapter do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((f"_B.{adapter}", f"_delta.{adapter}", f"dcft_a.{adapter}")):
                parameter.normal_(std=0.1)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_default_targets_are_all_compressed_layers(model, config_cls):
    names = {name for name, _ in sparse_linears(model)}
    before = logits(model)
    if config_cls.name == "dcft":  # one matrix of each pair
        names = {name for name in names if name.endswith(("q_proj", "v_proj"))}
    peft = get_peft_model(model, config_cls())
    assert set(peft.targeted_module_names) == names and torch.equal(logits(peft), before)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert trained and all(f".{peft.base_model.prefix}" in name for name in trained)
    assert all(p.dtype == torch.float32 for name, p in peft.named_parameters() if name in trained)


def test_all_linear_skips_the_head(model):
    names = {name for name, _ in sparse_linears(model)}
    model.lm_head = SparseLinear.from_dense(model.lm_head, "unstructured")
    assert set(get_peft_model(model, sparse_rt.SPPConfig(target_modules="all-linear")).targeted_module_names) == names


def test_chosen_targets(model):
    config = sparse_rt.SPPConfig(target_modules=["q_proj", "o_proj"], layers_to_transform=[1])
    expected = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    assert get_peft_model(model, config).targeted_module_names == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target_modules": ["lm_head"]}, "lm_head is a Linear"),
        ({"target_modules": ["mlp"]}, "is a LlamaMLP"),
        ({"groups": 7}, r"cut into 7 equal groups; allowed are \[1, 2, 4, 8, 16, 32, 64\]"),
    ],
)
def test_targets_that_cannot_be_adapted(model, options, words):
    with pytest.raises(UserError, match=words):
        get_peft_model(model, sparse_rt.SPPConfig(**options))
    assert not any(name.endswith("base_layer") for name, _ in model.named_modules()), "nothing was replaced"


def test_a_dense_model_is_refused(dense_llama):
    with pytest.raises(UserError, match="sparse-rt convert"):
        get_peft_model(load(dense_llama), sparse_rt.SPPConfig())


def test_stock_lora_is_refused_by_a_sentence_that_names_ours(model):
    with pytest.raises(AttributeError, match=r"sparse_rt\.SPPConfig or sparse_rt\.MaskLoRAConfig in place of LoRA"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_a_layer_with_another_adapter_is_refused(model):
    inject_adapter_in_model(IA3Config(target_modules=["q_proj"], feedforward_modules=[]), model)
    with pytest.raises(UserError, match="another kind of adapter"):
        get_peft_model(model, sparse_rt.SPPConfig(target_modules=["q_proj"]))


def test_save_and_load_in_every_way(model, config_cls, sparse_llama, tmp_path):
    peft = get_peft_model(model, config_cls(task_type="CAUSAL_LM"))
    randomize(peft)
    expected = logits(peft)
    peft.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all(f".{peft.base_model.prefix}" in name for name in file.keys())  # noqa: SIM118
    assert isinstance(PeftConfig.from_pretrained(tmp_path), config_cls)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(load(sparse_llama), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype="auto")), expected)
    native = load(sparse_llama)
    native.load_adapter(tmp_path)
    assert torch.equal(logits(native), expected)


def test_several_adapters(model, config_cls, tmp_path):
    base = logits(model)
    options = {"mode": "survivors"} if config_cls.name == "seft" else {}  # another mode moves the mask of all of them
    peft = get_peft_model(model, config_cls(**options))
    randomize(peft)
    first = logits(peft)
    peft.add_adapter("second", config_cls(**options))
    assert torch.equal(logits(peft), first), "adding does not activate"
    randomize(peft, "second")
    peft.set_adapter("second")
    second = logits(peft)
    assert not torch.equal(second, base)
    assert all(".second" in name for name, p in peft.named_parameters() if p.requires_grad)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), base)
    peft.save_pretrained(tmp_path, selected_adapters=["second"])
    peft.load_adapter(tmp_path / "second", "third")
    peft.set_adapter("third")
    assert torch.equal(logits(peft), second)
    peft.delete_adapter("third")
    peft.set_adapter("default")
    assert torch.equal(logits(peft), first)


def test_merge_unmerge_and_unload(model, config_cls, sparse_llama, tmp_path):
    base = logits(model)
    tensors = {name: (w.values.detach().clone(), w.metadata.detach().clone()) for name, w in sparse_linears(model)}
    peft = get_peft_model(model, config_cls())
    randomize(peft)
    adapted = logits(peft)
    peft.merge_adapter()
    if config_cls.name == "dcft":  # merged, the scale is rounded with the values and not with the output
        assert 0 < (logits(peft) - adapted).norm() < 0.02 * adapted.norm()
        adapted = logits(peft)
    assert torch.equal(logits(peft), adapted)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), base), "disabling a merged adapter restores the base values"
    merged = peft.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged), adapted)
    layers = dict(sparse_linears(merged))
    assert layers.keys() == tensors.keys() and all(type(layer) is SparseLinear for layer in layers.values())
    assert all(torch.equal(layers[name].metadata, metadata) for name, (_, metadata) in tensors.items())
    targeted = set(peft.targeted_module_names)
    assert all(torch.equal(layers[name].values, v) is (name not in targeted) for name, (v, _) in tensors.items())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), adapted)


def test_unload_gives_the_base_model_back(model, config_cls):
    base = logits(model)
    peft = get_peft_model(model, config_cls())
    randomize(peft)
    assert torch.equal(logits(peft.unload()), base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, config_cls, reentrant):
    def gradients():
        peft.zero_grad()
        peft.train()(TOKENS, labels=TOKENS).loss.backward()
        return [p.grad.clone() for p in peft.parameters() if p.requires_grad]

    peft = get_peft_model(model, config_cls())
    randomize(peft)
    plain = gradients()
    peft.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peft.enable_input_require_grads()
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))


def test_enum_member_is_added_once_and_behaves_like_the_others():
    class Kind(str, enum.Enum):
        OLD = "OLD"

    new = peft_hooks.add_enum_member(Kind, "NEW")
    assert peft_hooks.add_enum_member(Kind, "NEW") is new
    assert list(Kind) == [Kind.OLD, new] and Kind.NEW is Kind["NEW"] is Kind("NEW") is new
    assert (new.name, new.value, new == "NEW", "NEW" in list(Kind), len(Kind)) == ("NEW", "NEW", True, True, 2)
    assert PeftType("SPP").value == "SPP"


def test_other_versions_of_peft_are_refused(monkeypatch):
    monkeypatch.setattr("peft.__version__", "0.22.0")
    with pytest.raises(UserError, match=r"peft >= 0\.21, < 0\.22, found 0\.22\.0"):
        peft_hooks.check_version()


def test_peft_imported_first_learns_of_the_adapters():
    # The other order is what every other test here does: conftest imports sparse_rt before PEFT.
    code = "import peft, sparse_rt; print(*(k.value for k in peft.PEFT_TYPE_TO_TUNER_MAPPING))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.upper() for name in adapter_names()} <= set(done.stdout.split())
