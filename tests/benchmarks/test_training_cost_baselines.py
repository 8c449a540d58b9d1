"""The baselines of the training benchmarks compute what they say, against autograd on their equations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_cost_baselines import DenseLoRA, MaskedDense, OfficialSPP, gradients

from sparse_rt.adapters.registry import get_adapter
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops
from sparse_rt.nn import SparseLinear

M, N, TOKENS = 48, 32, 7
WIDE = {"dtype": torch.float64}


@pytest.fixture
def case():
    torch.manual_seed(0)
    weight = torch.randn(M, N, **WIDE)
    weight = weight * get_format("2:4").mask_from_scores(weight.abs())
    return weight, torch.randn(2, TOKENS, N, **WIDE).requires_grad_(), torch.randn(2, TOKENS, M, **WIDE)


def trained(layer):
    """Away from the initial values, where half of the gradients are zero."""
    with torch.no_grad():
        for parameter in layer.trainables:
            parameter.copy_(torch.randn_like(parameter))
    return layer


def expected(function, x, dy, *parameters):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, *parameters)]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def assert_close(found, wanted, **tolerance):
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want.view(have.shape), **tolerance)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_official_spp(case, groups):
    weight, x, dy = case
    layer = trained(OfficialSPP(weight, groups, dropout=0.0))
    group = torch.arange(M) * groups // M

    def equation(x, a, b):
        return F.linear(x, weight * (1 + 2.0 * b * a[group]))

    torch.testing.assert_close(layer(x), equation(x, *layer.trainables))
    assert_close(gradients(layer, x, dy), expected(equation, x, dy, *layer.trainables))


def test_official_spp_drops_inputs_of_the_adapter_only(case):
    weight, x, dy = case
    layer = trained(OfficialSPP(weight, dropout=0.5))
    torch.manual_seed(1)
    keep = F.dropout(torch.ones_like(x), 0.5)

    def equation(x, a, b):
        return F.linear(x, weight) + 2.0 * F.linear(x * keep, weight * b * a.repeat_interleave(M // 16, 0))

    torch.manual_seed(1)
    found = gradients(layer, x, dy)
    assert_close(found, expected(equation, x, dy, *layer.trainables))
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, weight * (1 + 2.0 * layer.b * layer.a.repeat_interleave(3, 0))))


def test_official_spp_is_the_adapter_on_compressed_weights(case):
    weight, x, dy = (t.detach().float() for t in case)
    adapter = get_adapter("spp")
    base = SparseLinear(N, M, "2:4", *get_format("2:4").compress(weight, weight != 0), None)
    ours = adapter.tuner_layer_cls(base, "default", adapter.config_cls())
    theirs = trained(OfficialSPP(weight, dropout=0.0))
    a, b = ours.spp_A["default"], ours.spp_B["default"]
    with torch.no_grad():
        a.copy_(theirs.a)
        b.copy_(theirs.b[:, 0])
    x.requires_grad_()
    assert_close(gradients(theirs, x, dy), torch.autograd.grad(ours(x), [x, a, b], dy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make, narrow", [(OfficialSPP, 0), (DenseLoRA, 3 * 2 * 8), (MaskedDense, 0)])
def test_units(case, make, narrow):
    """Operations of one step; LoRA has three products of its rank with each of A and B beside the units."""
    weight, x, dy = case
    layer = make(weight)
    with FlopCounterMode(display=False) as counter:
        gradients(layer, x, dy)
    tokens = x[..., 0].numel()
    small = narrow * tokens * (M + N)
    assert counter.get_total_flops() == layer.units * 2 * tokens * M * N + small


def test_lora(case):
    weight, x, dy = case
    layer = trained(DenseLoRA(weight, rank=4))

    def equation(x, a, b):
        return F.linear(x, weight + 4.0 * b @ a)

    torch.testing.assert_close(layer(x), equation(x, *layer.trainables))
    assert_close(gradients(layer, x, dy), expected(equation, x, dy, *layer.trainables))
    half = DenseLoRA(weight.bfloat16(), dtype=torch.float32)
    assert half.a.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


def test_masked_dense(case):
    weight, x, dy = case
    layer = MaskedDense(weight)
    dx, dw = gradients(layer, x, dy)
    wanted_x, wanted_w = expected(F.linear, x, dy, weight)
    assert_close([dx, dw], [wanted_x, wanted_w * (weight != 0)])
    values, metadata = get_format("2:4").compress(weight, weight != 0)
    kept = ops.values_grad(dy, x.detach(), metadata, "2:4", M, N, values)
    torch.testing.assert_close(dw[weight != 0].view(kept.shape), kept)
    optimizer = torch.optim.AdamW(layer.trainables, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(layer.weight == 0, weight == 0) and not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("make", [OfficialSPP, DenseLoRA])
def test_an_untrained_adapter_changes_nothing(case, make):
    weight, x, _ = case
    torch.testing.assert_close(make(weight)(x), F.linear(x, weight))


def test_rows_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="48 rows cannot be cut into 7 equal groups"):
        OfficialSPP(torch.zeros(M, N), groups=7)
