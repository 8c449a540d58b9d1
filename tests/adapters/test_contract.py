"""What every registered adapter promises: exact gradients, identity at the start, an untouched mask, nothing dense."""

import dataclasses

import pytest
import torch

import helpers
from sparse_rt.adapters import effective
from sparse_rt.adapters.registry import adapter_names, get_adapter
from sparse_rt.errors import UserError
from sparse_rt.nn import SparseLinear

SHAPES = [("2:4", 24, 36), ("4:8", 12, 40), ("unstructured", 20, 37)]
# Options that fit the shapes above and differ from the defaults.
OPTIONS = {
    "dcft v_proj": {},
    "dcft o_proj": {"side_vo": "o"},
    "spp": {"groups": 4, "scale": 1.5},
    "masklora": {"r": 3, "alpha": 4.5},
    "values": {},
    "seft": {"rank": 2, "mode": "survivors"},  # the modes that move the mask have tests of their own
}


def dense_spp(weight, mask, a, b):
    rows = a.repeat_interleave(weight.shape[0] // 4, dim=0)
    return weight * (1 + 1.5 * b[:, None] * rows)


def dense_masklora(weight, mask, a, b):
    return weight + 1.5 * (b @ a) * mask


def dense_values(weight, mask, delta):
    return weight + torch.zeros_like(weight).masked_scatter(mask, delta.to(weight.dtype))


def dense_rows(weight, mask, a):
    return weight * (1 + a[:, None])


def dense_columns(weight, mask, a):
    return weight * (1 + a)


def dense_seft(weight, mask, delta, positions, removed):
    change = torch.zeros_like(weight).flatten().scatter(0, positions.long(), delta.to(weight.dtype))
    return weight + change.view_as(weight)


# The adapted weight written down densely, straight from the paper's equation.
DENSE = {"spp": dense_spp, "masklora": dense_masklora, "values": dense_values, "seft": dense_seft} | {
    "dcft v_proj": dense_rows,
    "dcft o_proj": dense_columns,
}
# The adapted bias, where it is not that of the base layer.
BIAS = {"dcft v_proj": lambda bias, a: bias * (1 + a)}
# Which parameters the first step moves.
FIRST_STEP = {"spp": [False, True], "masklora": [False, True], "values": [True], "seft": [True]} | {
    "dcft v_proj": [True],
    "dcft o_proj": [True],
}
# Layers that an adapter treats differently, by the last part of their names.
LAYERS = {"dcft": ["v_proj", "o_proj"]}
# These scale what goes into a product or comes out of it, so the product's own rounding is seen: merged, the scale is
# rounded with the values instead.
SCALES = {"dcft v_proj", "dcft o_proj"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of layer of an adapter."""

    name: str
    config_cls: type
    layer_class: type

    def config(self, **options):
        return self.config_cls(**{**OPTIONS[self.name], **options})

    def bias(self, bias, parameters):
        return BIAS[self.name](bias, *parameters) if self.name in BIAS else bias


def cases():
    for name in adapter_names():
        adapter = get_adapter(name)
        for layer in LAYERS.get(name, [""]):
            key = f"{name} {layer}".strip()
            config = adapter.config_cls(**OPTIONS[key])
            yield Case(key, adapter.config_cls, adapter.layer_class(config, layer))


@pytest.fixture(params=cases(), ids=lambda case: case.name)
def adapter(request):
    return request.param


def make_layer(adapter, pattern, m, n, dtype=torch.float32, bias=True, active=True, **options):
    """(adapted layer, dense weight): parameters drawn at random, so that the adapter does something."""
    values, metadata, weight = helpers.compressed(m, n, pattern, dtype=dtype)
    base = SparseLinear(n, m, pattern, values, metadata, torch.randn(m).to(dtype) if bias else None)
    layer = adapter.layer_class(base, "default", adapter.config(**options))
    if active:
        for parameter in parameters_of(layer):
            torch.nn.init.normal_(parameter)
    return layer, weight


def parameters_of(layer, name="default"):
    """Those that are trained."""
    return [parameter for parameter in layer.parameters_of(name) if parameter.is_floating_point()]


def dense_weight(adapter, layer, weight, parameters, name="default"):
    """The dense formula with these parameters and with what the layer has beside them (positions)."""
    frozen = [getattr(layer, kept)[name] for kept in layer.frozen_names]
    return DENSE[adapter.name](weight, layer.base_layer.mask(), *parameters, *frozen)


def dense_gradients(adapter, layer, weight, x, dy):
    """(y, gradients of x, bias and parameters) of the dense formula in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.base_layer.bias, *parameters_of(layer))]
    dense, bias = dense_weight(adapter, layer, weight.double(), leaves[2:]), adapter.bias(leaves[1], leaves[2:])
    y = torch.nn.functional.linear(leaves[0], dense, bias)
    return y, torch.autograd.grad(y, leaves, dy.double())


@pytest.mark.parametrize("block_elements", [1 << 20, 3 * 40], ids=["one block", "many blocks"])
@pytest.mark.parametrize("pattern, m, n", SHAPES)
def test_gradients_in_float64(adapter, pattern, m, n, block_elements, monkeypatch):
    monkeypatch.setitem(effective.BLOCK_ELEMENTS, "cpu", block_elements)
    layer, weight = make_layer(adapter, pattern, m, n)
    layer.double()
    layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, m, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    expected, gradients = dense_gradients(adapter, layer, weight, x, dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = [x.grad, layer.base_layer.bias.grad, *(p.grad for p in parameters_of(layer))]
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pattern, m, n", SHAPES)
def test_gradients_in_bfloat16(adapter, pattern, m, n, exact):
    layer, weight = make_layer(adapter, pattern, m, n, dtype=torch.bfloat16, exact=exact)
    assert all(p.dtype == torch.float32 for p in parameters_of(layer))
    x = torch.randn(3, n, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(3, m, dtype=torch.bfloat16)
    layer(x).backward(dy)
    _, (dx, _, *expected) = dense_gradients(adapter, layer, weight, x, dy)
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), dx, rtol=0.05, atol=0.1)
    for parameter, gradient in zip(parameters_of(layer), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        # Only x and dy are rounded (and the product that is scaled): the gradient is accumulated in float32.
        tolerance = 2e-2 if adapter.name in SCALES else 1e-4
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identity_before_training(adapter, dtype):
    layer, _ = make_layer(adapter, "unstructured", 20, 37, dtype=dtype, active=False)
    x = torch.randn(4, 37, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_first_step_moves_only_the_zero_factor(adapter):
    layer, _ = make_layer(adapter, "2:4", 24, 36, active=False)
    layer(torch.randn(4, 36)).sum().backward()
    assert [bool(p.grad.any()) for p in parameters_of(layer)] == FIRST_STEP[adapter.name]


@pytest.mark.parametrize("pattern, m, n", SHAPES)
def test_merge_keeps_the_mask_and_unmerge_restores_every_bit(adapter, pattern, m, n):
    layer, weight = make_layer(adapter, pattern, m, n, dtype=torch.bfloat16)
    base = layer.base_layer
    values, metadata, bias = (t.detach().clone() for t in (base.values, base.metadata, base.bias))
    x = torch.randn(4, n, dtype=torch.bfloat16)
    unmerged = layer(x)
    layer.merge(safe_merge=True)
    assert torch.equal(base.metadata, metadata) and not torch.equal(base.values, values)
    if adapter.name in SCALES:
        torch.testing.assert_close(layer(x), unmerged, rtol=0.03, atol=0.1)
    else:
        torch.testing.assert_close(layer(x), unmerged)
    parameters = [p.detach().double() for p in parameters_of(layer)]
    expected = dense_weight(adapter, layer, weight.double(), parameters)
    assert torch.equal(base.decompress(), expected.bfloat16()), "the published equation, rounded once"
    assert torch.equal(base.bias, adapter.bias(bias.double(), parameters).bfloat16())
    assert not base.decompress()[~base.mask()].any()
    layer.unmerge()
    assert torch.equal(base.values, values) and torch.equal(base.bias, bias) and torch.equal(layer(x), unmerged)


def test_safe_merge_refuses_a_broken_adapter(adapter):
    layer, _ = make_layer(adapter, "2:4", 24, 36)
    values = layer.base_layer.values.detach().clone()
    with torch.no_grad():
        parameters_of(layer)[-1].view(-1)[3] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.values, values) and not layer.merged


def test_two_active_adapters_add_up(adapter):
    layer, weight = make_layer(adapter, "unstructured", 20, 37)
    layer.update_layer("second", layer.adapter_options["default"])
    for parameter in parameters_of(layer, "second"):
        torch.nn.init.normal_(parameter)
    layer.set_adapter(["default", "second"])
    both_parameters = [parameters_of(layer, name) for name in ("default", "second")]
    one, two = (
        dense_weight(adapter, layer, weight, parameters, name)
        for parameters, name in zip(both_parameters, ("default", "second"), strict=True)
    )
    bias = layer.base_layer.bias
    bias = sum(adapter.bias(bias, parameters) for parameters in both_parameters) - bias
    x = torch.randn(4, 37)
    both = layer(x)
    torch.testing.assert_close(both, torch.nn.functional.linear(x, one + two - weight, bias))
    layer.merge(adapter_names=["second"])
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer(x), both)


def test_exact_form_equals_the_fused_one(adapter):
    layer, _ = make_layer(adapter, "4:8", 12, 40)
    x = torch.randn(4, 40)
    fused = layer(x)
    layer.adapter_options["default"] = dataclasses.replace(layer.adapter_options["default"], exact=True)
    torch.testing.assert_close(layer(x), fused)


def test_exact_form_keeps_updates_that_bfloat16_rounds_away(adapter):
    layer, weight = make_layer(adapter, "2:4", 24, 36, dtype=torch.bfloat16, bias=False, exact=True)
    with torch.no_grad():
        for parameter in parameters_of(layer):
            parameter.mul_(0.01)  # the update is about 1e-4 of the weight
    x = torch.eye(36, dtype=torch.bfloat16)
    branch = effective.adapted_linear(x, layer.compressed(), None, layer.updates(["default"]), with_base=False)
    change = dense_weight(adapter, layer, weight.double(), parameters_of(layer)).detach() - weight.double()
    torch.testing.assert_close(branch.T.double(), change, rtol=1e-2, atol=1e-7)


def test_dropout_acts_on_the_update_and_in_training_only(adapter):
    if adapter.name in SCALES:
        with pytest.raises(UserError, match="no branch that dropout could act on"):
            adapter.config(dropout=0.5)
        return
    layer, _ = make_layer(adapter, "2:4", 24, 36, dropout=0.5)
    plain, _ = make_layer(adapter, "2:4", 24, 36)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, 36)
    assert torch.equal(layer.eval()(x), plain(x))
    base, full, dropped = layer.base_layer(x), plain(x), layer.train()(x)
    assert not torch.equal(dropped, full)
    torch.manual_seed(1)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - full).norm() < 0.2 * (full - base).norm(), "dropout keeps the expectation"


def test_nothing_of_the_size_of_the_weight_is_saved(adapter):
    m, n = 64, 96
    layer, _ = make_layer(adapter, "unstructured", m, n)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(torch.randn(3, n, requires_grad=True))
    assert saved and not any(t.numel() >= m * n for t in saved)
    values = layer.base_layer.values
    floats = [t for t in saved if t.is_floating_point() and t.numel() == values.numel()]
    known = {t.data_ptr() for t in (values, *parameters_of(layer))}
    assert all(t.data_ptr() in known for t in floats), "values are referenced, not copied"
    y.sum().backward()


def test_autocast_casts_activations_and_nothing_else(adapter):
    layer, _ = make_layer(adapter, "2:4", 24, 36)
    narrow, _ = make_layer(adapter, "2:4", 24, 36)
    narrow.load_state_dict(layer.state_dict())
    x, dy = torch.randn(4, 36), torch.randn(4, 24, dtype=torch.bfloat16)
    narrow(x.bfloat16()).backward(dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.backward(dy)
    assert y.dtype == torch.bfloat16 and torch.equal(y, narrow(x.bfloat16()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(parameters_of(layer), parameters_of(narrow), strict=True))


def test_compiles(adapter):
    layer, _ = make_layer(adapter, "2:4", 24, 36)
    x = torch.randn(4, 36, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x * 2) + 1, backend="eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x * 2) + 1)
    y.sum().backward()
    assert parameters_of(layer)[-1].grad is not None
