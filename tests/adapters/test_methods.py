"""What is particular to one adapter."""

import pytest
import torch

import helpers
from sparse_rt import MaskLoRAConfig, SPPConfig, ValuesConfig
from sparse_rt.adapters import effective
from sparse_rt.adapters.effective import Update, Weight, adapted_linear, effective_values
from sparse_rt.adapters.masklora import MaskLoRALayer
from sparse_rt.adapters.spp import SPPLayer
from sparse_rt.adapters.values import ValuesLayer
from sparse_rt.errors import UserError
from sparse_rt.nn import SparseLinear


def base_layer(m, n, pattern="unstructured", **options):
    return SparseLinear(n, m, pattern, *helpers.compressed(m, n, pattern, **options)[:2], None)


def test_spp_gradient_invariant_per_group():
    layer = SPPLayer(base_layer(24, 37), "default", SPPConfig(groups=4)).double()
    a, b = layer.spp_A["default"], layer.spp_B["default"]
    torch.nn.init.normal_(b)
    layer(torch.randn(5, 37, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close((b * b.grad).view(4, 6).sum(1), (a * a.grad).sum(1), rtol=1e-10, atol=1e-10)


def test_spp_keeps_explicit_zeros_and_masklora_may_fill_them():
    base = base_layer(16, 32)
    base.weight_values.data[:10] = 0
    for layer, stays in (
        (SPPLayer(base, "default", SPPConfig(groups=4)), True),
        (MaskLoRALayer(base, "default", MaskLoRAConfig()), False),
    ):
        torch.nn.init.normal_(getattr(layer, layer.adapter_layer_names[1])["default"])
        layer.merge()
        assert bool((base.values[:10] == 0).all()) is stays
        layer.unmerge()


def test_spp_refuses_rows_it_cannot_cut():
    assert "allowed are [1, 2, 3, 4, 6, 8, 12, 24]" in SPPLayer.refuse(SPPConfig(), 24, 36)
    assert SPPLayer.refuse(SPPConfig(groups=8), 24, 36) is None


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SPPConfig(groups=0), "groups must be at least 1"),
        (lambda: MaskLoRAConfig(r=0), "r must be at least 1"),
        (lambda: SPPConfig(dropout=1.0), "dropout must be from 0"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_parameter_counts_of_the_papers():
    base = base_layer(64, 96)
    spp = SPPLayer(base, "default", SPPConfig())
    assert sum(p.numel() for p in spp.parameters() if p.requires_grad) == 16 * 96 + 64
    assert spp.spp_A["default"].abs().max() <= 96**-0.5 and not spp.spp_B["default"].any()
    lora = MaskLoRALayer(base, "default", MaskLoRAConfig(r=4))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 4 * (96 + 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_spp_in_one_native_pass_equals_the_plain_route(monkeypatch, pattern, dtype):
    """Values, gradients and merge; the plain route runs in float64 and its result is rounded once."""
    m, n = 24, 200
    layer = SPPLayer(base_layer(m, n, pattern, dtype=dtype), "default", SPPConfig(groups=4))
    torch.nn.init.normal_(layer.spp_B["default"])
    weight, (update,) = layer.compressed(), layer.updates(["default"])
    x, dy = torch.randn(9, n).to(dtype), torch.randn(9, m).to(dtype)
    if update.fused.refusal(weight, x, dy):
        pytest.skip("no kernel for this processor")
    wide = Weight.of(weight.values.double(), weight.metadata, pattern, m, n)
    a, b = (p.detach().double().requires_grad_() for p in update.parameters)
    exact = effective_values(wide, [Update(update.function, (a, b))])
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(effective_values(weight, [update]), exact.to(dtype), rtol=2 * rounding, atol=1e-6)
    adapted_linear(x.double(), wide, None, [Update(update.function, (a, b))]).backward(dy.double())
    for found, expected in zip(update.fused.gradients(weight, dy, x, *update.parameters), (a, b), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected.grad, rtol=1e-4, atol=1e-5)

    monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    assert "SPARSE_RT_BACKEND" in update.fused.refusal(weight, x, dy)


def test_training_spp_forms_no_gradient_of_the_values(monkeypatch):
    layer = SPPLayer(base_layer(24, 36), "default", SPPConfig(groups=4))
    weight, (update,) = layer.compressed(), layer.updates(["default"])
    x = torch.randn(5, 36, requires_grad=True)
    if update.fused.refusal(weight, x):
        pytest.skip("no kernel for this processor")
    monkeypatch.setattr(effective.ops, "values_grad", lambda *_: pytest.fail("the values need no gradient"))
    layer(x).sum().backward()
    assert x.grad.any() and layer.spp_B["default"].grad.any()


def test_values_are_trained_in_one_pass_each_way(monkeypatch):
    """The gradient of the values is that of D, and it is written once."""
    base = base_layer(24, 36, dtype=torch.bfloat16)
    layer = ValuesLayer(base, "default", ValuesConfig())
    monkeypatch.setattr(ValuesLayer, "update", lambda *_: pytest.fail("the plain route is not needed"))
    real, found = effective.ops.values_grad, []
    monkeypatch.setattr(effective.ops, "values_grad", lambda *a: found.append(real(*a)) or found[-1])
    x = torch.randn(5, 36, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    delta = layer.values_delta["default"]
    assert len(found) == 1 and found[0].dtype == torch.float32
    assert torch.equal(delta.grad, found[0])
    # Its shape is that of the values, so a float32 optimizer steps on a master copy of them.
    assert delta.shape == base.values.shape and delta.grad.any() and x.grad.any()


def test_updates_below_the_precision_of_the_values_add_up():
    base = base_layer(16, 32, dtype=torch.bfloat16)
    base.weight_values.data.fill_(1)
    layer = ValuesLayer(base, "default", ValuesConfig())
    with torch.no_grad():
        for _ in range(8):
            layer.values_delta["default"] += 2.0**-10  # half of what bfloat16 can add to 1 is 2^-9
    layer.merge()
    assert torch.equal(base.values, torch.full_like(base.values, 1 + 2.0**-7))
