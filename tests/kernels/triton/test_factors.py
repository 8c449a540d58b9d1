"""The factors of a weight (SPP) against float64 autograd, and through the layer that uses them."""

import pytest
import torch

import packed_cases
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format

pytest.importorskip("triton")
from sparse_rt.kernels.triton import factors

CASES = (
    ("2:4", 1, 4, None),
    ("2:4", 70, 264, None),
    ("4:8", 33, 264, None),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 150, 130, 0.7),
)
# One group, a group a row, and groups that begin inside a tile of rows.
GROUPS = {1: (1,), 70: (1, 7), 33: (3,), 17: (17,), 150: (2, 50)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on(device, case, dtype):
    weight = packed_cases.weight(*case, dtype)
    mask = get_format(weight.pattern).unpack_mask(weight.metadata, weight.m, weight.n)
    return weight.values.to(device), weight.metadata.to(device), mask.to(device), weight.dense.to(device), weight.shape


def pair(device, groups, m, n):
    return torch.randn(groups, n, device=device), torch.randn(m, device=device)


def factor(a, b, m, base):
    return base + 2.0 * b.double()[:, None] * a.double().repeat_interleave(m // a.shape[0], 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_times_factors(device, case):
    for dtype, result in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32,) * 2):
        values, metadata, mask, dense, shape = on(device, case, dtype)
        for groups, base in zip(GROUPS[shape[1]], (True, False), strict=False):
            a, b = pair(device, groups, *shape[1:])
            out = torch.full_like(values, float("nan"), dtype=result)
            returned = factors.apply_factors(out, values, metadata, *shape, a, b, 2.0, base)
            expected = (dense * factor(a, b, shape[1], base))[mask]
            bound = max(torch.finfo(result).eps, 5e-7) * expected.abs() + 1e-6
            assert returned is out
            assert bool(((out.double().flatten() - expected).abs() <= bound).all()), (groups, base, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_float64_autograd(device, case):
    for dtype, tokens in ((torch.bfloat16, 70), (torch.float16, 1), (torch.float32, 17)):
        values, metadata, _, dense, shape = on(device, case, dtype)
        _, m, n = shape
        dy, x = torch.randn(tokens, m).to(device, dtype), torch.randn(tokens, n).to(device, dtype)
        for groups in GROUPS[m]:
            a, b = (tensor.double().requires_grad_() for tensor in pair(device, groups, m, n))
            (x.double() @ (dense * factor(a, b, m, 1.0)).T).backward(dy.double())
            weight = values, metadata, *shape
            da, db = factors.factors_grad(dy, x, *weight, a.detach().float(), b.detach().float(), 2.0)
            assert da.dtype == db.dtype == torch.float32
            for found, expected in ((da, a.grad), (db, b.grad)):
                error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(8)
                assert float(error) < 2e-6, (case, dtype, groups)


def test_gradients_are_the_same_in_every_run_and_zero_without_tokens(device):
    values, metadata, _, _, shape = on(device, CASES[4], torch.bfloat16)
    _, m, n = shape
    dy, x = torch.randn(33, m, device=device).bfloat16(), torch.randn(33, n, device=device).bfloat16()
    weight = values, metadata, *shape, *pair(device, 2, m, n), 0.5
    first, second = (factors.factors_grad(dy, x, *weight) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for found in factors.factors_grad(dy[:0], x[:0], *weight):
        assert not bool(found.any())


def test_infinite_activations_stay_at_kept_positions(device):
    """A column that no row keeps does not reach the gradients, whatever its activations are."""
    weight = torch.randn(8, 16)
    weight[:, 3] = 0
    values, metadata = get_format("unstructured").compress(weight, weight != 0)
    x = torch.randn(4, 16)
    x[:, 3] = float("inf")
    tensors = torch.ones(4, 8), x, values, metadata
    dy, x, values, metadata = (tensor.to(device) for tensor in tensors)
    da, db = factors.factors_grad(dy, x, values, metadata, "unstructured", 8, 16, *pair(device, 1, 8, 16), 1.0)
    assert bool(da.isfinite().all()) and bool(db.isfinite().all())


def test_factors_that_do_not_fit_are_refused(device):
    values, metadata, _, _, shape = on(device, CASES[4], torch.float32)
    a, b = pair(device, 4, *shape[1:])
    with pytest.raises(UserError, match="divisor of 150"):
        factors.apply_factors(torch.empty_like(values), values, metadata, *shape, a, b, 1.0)
    a, b = pair(device, 5, *shape[1:])
    with pytest.raises(UserError, match="contiguous result"):
        factors.apply_factors(torch.empty_like(values)[:-1], values, metadata, *shape, a, b, 1.0)
