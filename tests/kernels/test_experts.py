"""Experts: both operators against a float64 computation of the equation, for every pattern and activation."""

import pytest
import torch

from helpers import compressed
from sparse_rt.errors import UserError
from sparse_rt.kernels import experts as moe
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.experts import join

HIDDEN, INTERMEDIATE, EXPERTS = 48, 40, 5
PATTERNS = ("2:4", "unstructured", "4:8")


def layer(pattern, activation="silu", dtype=torch.float32, sparsity=0.6):
    """[(values, metadata, dense)] of every expert, up and down."""
    rows = INTERMEDIATE * (2 if moe.is_gated(activation) else 1)
    up = [compressed(rows, HIDDEN, pattern, sparsity, dtype, seed=e) for e in range(EXPERTS)]
    return up, [compressed(HIDDEN, INTERMEDIATE, pattern, sparsity, dtype, seed=50 + e) for e in range(EXPERTS)]


def routing(tokens, k, seed=0, missing=()):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)]).view(tokens, k)
    weights = torch.rand(tokens, k, generator=generator)
    for expert in missing:
        ids[ids == expert] = -1
    return weights, ids


def expected(x, weights, ids, up, down, activation):
    """The equation in float64; the weights of other ranks' experts add nothing."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if expert >= 0:
                h = moe.activate(up[expert][2].double() @ x[token].double(), activation)
                y[token] += weight * (down[expert][2].double() @ h)
    return y


def tall(parts):
    return torch.cat([values for values, *_ in parts]), torch.cat([metadata for _, metadata, _ in parts])


def run(x, weights, ids, up, down, pattern, activation="silu"):
    return moe.experts(*(x, weights, ids, *tall(up), *tall(down)), pattern, pattern, EXPERTS, INTERMEDIATE, activation)


def pack_all(parts, pattern):
    return join([packed.pack(values, metadata, pattern, *dense.shape) for values, metadata, dense in parts])


def run_packed(x, weights, ids, up, down, pattern, activation="silu"):
    operands = *pack_all(up, pattern), *pack_all(down, pattern)
    return moe.packed_experts(x, weights, ids, *operands, INTERMEDIATE, activation)


native = pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native kernels here")
RUNS = [pytest.param(run, id="canonical"), pytest.param(run_packed, id="packed", marks=native)]


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens,k", [(1, 1), (1, 2), (3, 2), (70, 3)])
def test_the_sum_over_experts_is_that_of_the_equation(call, pattern, tokens, k):
    up, down = layer(pattern)
    x = torch.randn(tokens, HIDDEN)
    weights, ids = routing(tokens, k)
    wanted = expected(x, weights, ids, up, down, "silu")
    assert (call(x, weights, ids, up, down, pattern) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_every_activation(call, activation):
    up, down = layer("unstructured", activation)
    x = torch.randn(6, HIDDEN)
    weights, ids = routing(6, 2)
    wanted = expected(x, weights, ids, up, down, activation)
    assert (call(x, weights, ids, up, down, "unstructured", activation) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_narrow_dtypes_round_between_the_products(call, dtype, ids_dtype):
    up, down = layer("2:4", dtype=dtype)
    x = torch.randn(9, HIDDEN).to(dtype)
    weights, ids = routing(9, 2)
    found = call(x, weights, ids.to(ids_dtype), up, down, "2:4")
    wanted = expected(x, weights, ids, up, down, "silu")
    assert found.dtype == dtype and (found - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
def test_experts_of_other_ranks_add_nothing(call):
    up, down = layer("2:4")
    x = torch.randn(8, HIDDEN)
    weights, ids = routing(8, 2, missing=(0, 3))
    wanted = expected(x, weights, ids, up, down, "silu")
    assert torch.allclose(call(x, weights, ids, up, down, "2:4").double(), wanted, atol=1e-4)
    nowhere = torch.full_like(ids, -1)
    assert not call(x, weights, nowhere, up, down, "2:4").any()


@pytest.mark.parametrize("call", RUNS)
def test_no_token_and_rows_that_are_not_contiguous(call):
    up, down = layer("unstructured")
    weights, ids = routing(4, 2)
    x = torch.randn(4, 2 * HIDDEN)[:, ::2]
    wanted = expected(x, weights, ids, up, down, "silu")
    assert (call(x, weights, ids, up, down, "unstructured") - wanted).norm() <= 1e-6 * wanted.norm()
    assert call(x[:0], weights[:0], ids[:0], up, down, "unstructured").shape == (0, HIDDEN)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'swish' are not supported; known are .*silu"):
        moe.is_gated("swish")


@native
def test_both_operators_are_seen_by_the_compiler():
    up, down = layer("2:4")
    x = torch.randn(3, HIDDEN)
    weights, ids = routing(3, 2)
    how = ("2:4", "2:4", EXPERTS, INTERMEDIATE, "silu")
    torch.library.opcheck(torch.ops.sparse_rt.experts, (x, weights, ids, *tall(up), *tall(down), *how))
    operands = *pack_all(up, "2:4"), *pack_all(down, "2:4")
    torch.library.opcheck(torch.ops.sparse_rt.packed_experts, (x, weights, ids, *operands, INTERMEDIATE, "silu"))
