"""DCFT: which functions are the same, what it counts, what it refuses."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

import helpers
from sparse_rt import DCFTConfig
from sparse_rt.adapters.dcft import map_of
from sparse_rt.adapters.dcft.layers import Scale, spread
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load
from sparse_rt.kernels.columns import scale_columns
from sparse_rt.nn import SparseLinear

TOKENS = torch.arange(24).reshape(2, 12)
FAMILIES = ["llama", "qwen2", "qwen3", "opt"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder) of a compressed float32 model; llama and the Qwens have two query heads to a key head."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = helpers.tiny_model(folder / "dense", request.param, dtype=torch.float32)
    return request.param, helpers.compress_folder(dense, folder / "sparse", "2:4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return helpers.compress_folder(helpers.tiny_llama(folder / "dense", dtype=torch.float32), folder / "sparse", "2:4")


def adapted(base, **options):
    return get_peft_model(load(base).double(), DCFTConfig(**options)).double().eval()


def set_maps(model, make):
    """Parameters of all layers from ``make(name, entries)``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dcft_a." in name:
                parameter.copy_(make(name, parameter.numel()))


def random_maps(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    set_maps(model, lambda name, entries: 0.3 * torch.randn(entries, generator=generator))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Scale)}


def test_scale_of_columns_and_its_gradients():
    h, scale = torch.randn(2, 300, 7).double().requires_grad_(), torch.randn(7).double().requires_grad_()
    assert torch.autograd.gradcheck(scale_columns, (h[:, :5], scale))
    dy = torch.randn(2, 300, 7).double()
    dh, ds = torch.autograd.grad(scale_columns(h, scale), (h, scale), dy)
    close(dh, dy * scale)
    close(ds, (h * dy).sum((0, 1)))
    narrow = h.detach().bfloat16().requires_grad_()
    y = scale_columns(narrow, scale.float())
    assert torch.equal(y, (narrow.float() * scale.float()).bfloat16()), "computed in float32 and rounded once"
    y.backward(dy.bfloat16())
    assert narrow.grad.dtype == torch.bfloat16


def test_shared_and_tied_entries():
    a = torch.arange(4.0)
    assert spread(a, 2, None).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert spread(a, 1, 4).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert spread(a[:2], 2, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("sides", [("q", "v"), ("k", "o")], ids=["q and v", "k and o"])
def test_merging_scales_rows_columns_biases_and_norms(family, sides):
    """The scale before the rotary embedding is that of the rows; a norm behind the projection takes its place."""
    name, base = family
    model = adapted(base, units="qk,vo,ud", side_qk=sides[0], side_vo=sides[1])
    random_maps(model)
    found = {key.rpartition(".")[2] for key in layers(model)}
    out, down = ("out_proj", "fc2") if name == "opt" else ("o_proj", "down_proj")
    qk = f"{sides[0]}_norm" if name == "qwen3" else f"{sides[0]}_proj"
    assert found == {qk, "v_proj" if sides[1] == "v" else out, down}
    expected, maps = logits(model), {key: map_of(layer) for key, layer in layers(model).items()}
    assert (expected - logits(load(base).double())).norm() > 0.01 * expected.norm()
    masks = {key: layer.base_layer.mask() for key, layer in layers(model).items() if not layer.adapts_vectors}
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    plain = load(base).double()
    for key, scale in maps.items():
        key = key.removeprefix("base_model.model.")
        before, after = plain.get_submodule(key), merged.get_submodule(key)
        if "norm" in key:
            close(after.weight, before.weight * scale)
            continue
        columns = key.endswith((out, down))
        assert torch.equal(after.mask(), masks["base_model.model." + key])
        close(after.decompress(), before.decompress() * (scale if columns else scale[:, None]))
        if before.bias is not None:
            close(after.bias, before.bias if columns else before.bias * scale)


def repeated(maps, heads, kv_heads):
    """A map of the key heads, an entry for every channel of the query heads that read them."""
    return maps.view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()


def test_values_and_outputs_are_two_sides_of_one_map(llama):
    one, other = (adapted(llama, units=["vo"], side_vo=side) for side in "vo")
    random_maps(one)
    maps = iter([repeated(layer.dcft_a["default"], 4, 2) for layer in layers(one).values()])
    set_maps(other, lambda *_: next(maps))
    close(logits(one), logits(other))


def test_up_and_down_are_two_sides_of_one_map(llama):
    one, other = (adapted(llama, units=["ud"], side_ud=side) for side in ("up", "down"))
    for model in (one, other):
        random_maps(model)
    close(logits(one), logits(other))


def test_queries_and_keys_are_two_sides_when_rotary_pairs_are_tied(llama):
    def difference(tied):
        one, other = (adapted(llama, units=["qk"], side_qk=side, rope_tied=tied) for side in "kq")
        random_maps(one)
        maps = iter([repeated(layer.dcft_a["default"], 4, 2) for layer in layers(one).values()])
        set_maps(other, lambda *_: next(maps))
        return (logits(one) - logits(other)).norm() / logits(one).norm()

    assert difference(tied=True) < 1e-9
    assert difference(tied=False) > 1e-4


def test_gradients_of_a_model_against_finite_differences(family):
    _, base = family
    model = adapted(base, units="qk,vo,ud", share=2)
    random_maps(model)
    weight = torch.randn(*TOKENS.shape, model.config.vocab_size, dtype=torch.float64)

    def loss():
        return (model(TOKENS).logits * weight).sum()

    loss().backward()
    for name, parameter in model.named_parameters():
        if "layers.0" not in name or not parameter.requires_grad:
            continue
        # Along the gradient itself the slope is largest; the models' own norms compute in float32.
        direction, step = parameter.grad / parameter.grad.norm(), 1e-3
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter += sign * step * direction
                losses.append(loss())
                parameter -= sign * step * direction
        numerical = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(parameter.grad.norm(), numerical, rtol=0.01, atol=0)


def test_no_gradient_of_a_weight_is_formed(llama, monkeypatch):
    from sparse_rt.adapters import effective

    model = get_peft_model(load(llama), DCFTConfig(units="qk,vo,ud"))
    monkeypatch.setattr(effective.ops, "values_grad", lambda *_: pytest.fail("no weight has a gradient"))
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_vectors_of_tasks_are_switched_at_inference(llama, tmp_path):
    model = adapted(llama)
    random_maps(model, seed=1)
    first = logits(model)
    model.save_pretrained(tmp_path / "task1")
    random_maps(model, seed=2)
    second = logits(model)
    model.save_pretrained(tmp_path / "task2")
    serving = PeftModel.from_pretrained(load(llama).double(), tmp_path / "task1", adapter_name="task1").double()
    serving.load_adapter(tmp_path / "task2", adapter_name="task2")
    serving.double()
    for name, expected in (("task1", first), ("task2", second), ("task1", first)):
        serving.set_adapter(name)
        assert torch.equal(logits(serving), expected)


def test_parameters_of_llama_2_70b(record_property):
    """0.0107 per mille, counted on the model's shapes without its weights."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    config.vocab_size = 32000
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            m, n = linear.weight.shape
            empty = SparseLinear.empty(n, m, False, "2:4", m * n // 2, torch.bfloat16)
            model.set_submodule(name, empty)
    adapter = get_peft_model(model, DCFTConfig())
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    print(f"LLaMA-2-70B: {trained:,} of {total:,} parameters, {1000 * trained / total:.4f} per mille")
    assert trained == 737_280 and total == 68_976_648_192
    assert round(1000 * trained / total, 4) == 0.0107


def test_identity_and_widths(llama):
    model = get_peft_model(load(llama), DCFTConfig(units="qk,vo,ud", rope_tied=True, share=4))
    assert torch.equal(logits(model), logits(load(llama)))
    widths = {name.split(".")[-3]: p.numel() for name, p in model.named_parameters() if "dcft_a" in name}
    assert widths == {"q_proj": 64 // 2 // 4, "v_proj": 32 // 4, "down_proj": 160 // 4}
    assert model.peft_config["default"].head_dim == 16


@pytest.mark.parametrize(
    "options, words",
    [
        ({"units": "qk,kv"}, "units are some of qk, vo, ud, got 'qk,kv'"),
        ({"units": []}, "units are some of"),
        ({"side_qk": "v"}, "side_qk must be q or k, got 'v'"),
        ({"penalty": "l2"}, "penalty must be none or frob or cos or taylor"),
        ({"share": 0}, "share must be at least 1"),
        ({"similarity": -1.0}, "similarity must be at least 0"),
        ({"dropout": 0.1}, "no branch that dropout could act on"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        DCFTConfig(**options)


def test_models_without_the_matrix_are_refused(family, llama):
    name, base = family
    if name == "opt":
        with pytest.raises(UserError, match="looks for modules called up_proj .* take side_ud=down"):
            adapted(base, units="ud", side_ud="up")
        with pytest.raises(UserError, match=r"this model \(opt\) has no rotary embedding"):
            adapted(base, rope_tied=True)
    with pytest.raises(UserError, match="cannot be shared by 5; share must divide"):
        adapted(base, share=5)
    with pytest.raises(UserError, match=r"units vo \(v side\) adapts v_proj, not .*k_proj; leave target_modules out"):
        adapted(base, units="vo", target_modules=["k_proj"])


def test_fused_projections_are_refused_by_name():
    config = transformers.Phi3Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=128,
        pad_token_id=0,
    )
    model = transformers.Phi3ForCausalLM(config)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, SparseLinear.from_dense(linear, "unstructured"))
    with pytest.raises(
        UserError, match="q_proj or q_norm for the q side of qk, and this model has none; qkv_proj, gate_up"
    ):
        get_peft_model(model, DCFTConfig())
    found = get_peft_model(model, DCFTConfig(units="vo,ud", side_vo="o"))
    assert set(found.targeted_module_names) == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}


def test_a_norm_that_does_not_scale_by_its_weight_is_refused(tmp_path):
    base = helpers.compress_folder(helpers.tiny_model(tmp_path / "dense", "qwen3"), tmp_path / "sparse", "2:4")
    model = load(base)

    class Shifted(type(model.model.layers[0].self_attn.q_norm)):
        def forward(self, x):
            return super().forward(x) + x

    model.model.layers[1].self_attn.q_norm.__class__ = Shifted
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_norm: a Shifted does not scale its output"):
        get_peft_model(model, DCFTConfig())
