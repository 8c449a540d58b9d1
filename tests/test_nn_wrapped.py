"""``SparseLinear`` with a wrapper: y = A (S (B x)) + b, as a linear layer with the product of the three."""

import copy

import pytest
import torch

from helpers import compressed
from sparse_rt.formats.wrapper import Wrapper
from sparse_rt.nn import SparseLinear

M, N = 24, 64


def wrapped(pattern="2:4", dtype=torch.float32, bias=True):
    """(layer, its weight in float64)."""
    values, metadata, core = compressed(M, N, pattern, 0.5, dtype)
    generator = torch.Generator().manual_seed(1)
    out, inner = (torch.randn(s, generator=generator).to(dtype) / 2 for s in ((M // 6, 6, 6), (N // 8, 8, 8)))
    vector = torch.randn(M, generator=generator).to(dtype) if bias else None
    layer = SparseLinear(N, M, pattern, values, metadata, vector, Wrapper(out, inner))
    return layer, torch.block_diag(*out.double()) @ core.double() @ torch.block_diag(*inner.double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_multiplies_with_all_three_matrices(pattern, dtype, tolerance, bias, training):
    layer, weight = wrapped(pattern, dtype, bias)
    layer.train(training)
    x = torch.randn(2, 5, N).to(dtype)
    with torch.inference_mode(not training):
        found = layer(x)
    expected = x.double() @ weight.T + (layer.bias.double() if bias else 0)
    assert found.dtype == dtype and found.shape == (2, 5, M)
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_a_packed_core_gives_the_same_and_comes_back():
    layer, _ = wrapped(dtype=torch.bfloat16)
    layer.eval()
    if layer.pack_refusal() is not None:
        pytest.skip(layer.pack_refusal())
    before, x = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, torch.randn(3, N).bfloat16()
    canonical = layer(x)
    layer.pack()
    assert layer.weight_nbytes == layer._packed.nbytes + layer.wrapper.nbytes
    with torch.inference_mode():
        assert torch.allclose(layer(x).float(), canonical.float(), rtol=3e-2, atol=3e-2)
    assert {name: torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_gradients_pass_through_to_the_input():
    layer, weight = wrapped()
    x = torch.randn(7, N, requires_grad=True)
    dy = torch.randn(7, M)
    layer(x).backward(dy)
    assert torch.allclose(x.grad.double(), dy.double() @ weight, atol=1e-4)
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


def test_dense_forms_hold_the_product_and_the_mask_is_that_of_the_core():
    layer, weight = wrapped()
    assert torch.allclose(layer.decompress().double(), weight, atol=1e-5)
    dense = layer.to_dense()
    assert torch.equal(dense.weight, layer.decompress()) and dense.bias is layer.bias
    assert layer.mask().sum() == M * N // 2 and layer.sparsity == 0.5
    assert layer.weight_nbytes == layer.values.nbytes + layer.metadata.nbytes + 4 * (M * 6 + N * 8)
    assert "wrapper=block_diagonal" in repr(layer)


def test_state_dicts_and_copies_carry_the_wrapper():
    layer, _ = wrapped()
    names = {"weight_values", "weight_meta", "weight_wrapper_out", "weight_wrapper_in", "bias"}
    assert layer.state_dict().keys() == names
    other = SparseLinear.empty(N, M, True, "2:4", layer.nnz, torch.float32, device="cpu", blocks=(6, 8))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, N)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.wrapper.inner.dtype == torch.bfloat16


def test_a_plain_layer_has_none():
    values, metadata, _ = compressed(M, N, "2:4")
    layer = SparseLinear(N, M, "2:4", values, metadata, None)
    assert layer.wrapper is None and layer.state_dict().keys() == {"weight_values", "weight_meta"}
