"""Chosen positions, low-rank products, the largest entries of dY^T X, and scaled columns, against float64."""

import pytest
import torch

import packed_cases
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import columns as dispatched

pytest.importorskip("triton")
from sparse_rt.kernels.triton import columns, growth
from sparse_rt.kernels.triton import gradient_epilogues as epilogues

CASES = (
    ("2:4", 1, 4, None),
    ("2:4", 70, 264, None),
    ("4:8", 33, 136, None),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 130, 140, 0.9),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on(device, case, dtype):
    weight = packed_cases.weight(*case, dtype)
    mask = get_format(weight.pattern).unpack_mask(weight.metadata, weight.m, weight.n)
    return weight.metadata.to(device), mask.to(device), weight.shape


def tokens_of(device, m, n, tokens, dtype):
    return torch.randn(tokens, m).to(device, dtype), torch.randn(tokens, n).to(device, dtype)


def close(found, expected, bound=2e-6):
    """Largest error relative to the largest value, or to 8 where sums of normal products came out smaller."""
    if expected.numel() == 0:
        return found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(8)) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", (0.0, 0.02, 1.0))
@pytest.mark.parametrize("m, n", ((1, 4), (70, 264)))
def test_positions(device, m, n, share, dtype):
    chosen = torch.rand(m, n, device=device) < share
    if share and m > 2:
        chosen[m // 2], chosen[0] = False, True
    rows, cols = chosen.nonzero().unbind(1)
    index = epilogues.positions_index(rows, cols.int(), m, n)
    dy, x = tokens_of(device, m, n, 33, dtype)
    expected = (dy.double().T @ x.double())[chosen]
    found = epilogues.positions_grad(dy, x, index, m, n)
    assert found.dtype == torch.float32 and close(found, expected)
    twice = epilogues.positions_grad(dy, x, index, m, n, add_to=found.clone())
    assert torch.equal(twice, found + found)
    assert not bool(epilogues.positions_grad(dy[:0], x[:0], index, m, n).any())
    assert torch.equal(epilogues.positions_grad(dy[:0], x[:0], index, m, n, add_to=found), found)


def test_positions_are_refused_where_the_sum_has_another_length(device):
    index = epilogues.positions_index(*torch.ones(4, 4, device=device).nonzero().unbind(1), 4, 4)
    ones = torch.ones(2, 4, device=device)
    with pytest.raises(UserError, match="16 positions"):
        epilogues.positions_grad(ones, ones, index, 4, 4, add_to=torch.zeros(15, device=device))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rank_products_equal_float64_autograd(device, case, monkeypatch):
    monkeypatch.setattr(epilogues, "PARTIAL_BYTES", 1 << 16)  # several bands of rows
    for rank, dtype, tokens in ((1, torch.bfloat16, 70), (8, torch.float16, 3), (20, torch.float32, 17)):
        metadata, mask, shape = on(device, case, dtype)
        _, m, n = shape
        dy, x = tokens_of(device, m, n, tokens, dtype)
        a, b = (torch.randn(size, device=device).double().requires_grad_() for size in ((rank, n), (m, rank)))
        (x.double() @ (0.5 * (b @ a) * mask).T).backward(dy.double())
        found = epilogues.rank_products(dy, x, metadata, *shape, a.detach().float(), b.detach().float(), 0.5)
        assert close(found[0], a.grad) and close(found[1], b.grad), (rank, dtype)
    for zero in epilogues.rank_products(dy[:0], x[:0], metadata, *shape, a.detach(), b.detach(), 0.5):
        assert not bool(zero.any())


def test_rank_products_of_a_wrong_rank_are_refused(device):
    metadata, _, shape = on(device, CASES[1], torch.float32)
    ones = torch.ones(2, 70, device=device), torch.ones(2, 264, device=device)
    with pytest.raises(UserError, match="low-rank"):
        epilogues.rank_products(*ones, metadata, *shape, torch.ones(3, 264), torch.ones(70, 2), 1.0)


@pytest.mark.parametrize("where", ("pruned", "kept"))
@pytest.mark.parametrize("case", (("2:4", 17, 60, None), ("unstructured", 70, 130, 0.9)), ids=str)
def test_the_largest_entries(device, case, where, monkeypatch):
    monkeypatch.setattr(growth, "SURPLUS_FLOOR", 4)  # more than one pass
    metadata, mask, shape = on(device, case, torch.bfloat16)
    dy, x = tokens_of(device, *shape[1:], 20, torch.bfloat16)
    expected = dy.double().T @ x.double()
    allowed = mask if where == "kept" else ~mask
    for count in (0, 40, int(allowed.sum()) + 5):
        rows, cols, found = growth.largest_gradients(dy, x, metadata, *shape, count, where)
        rows, cols = rows.long(), cols.long()
        assert found.numel() == min(count, int(allowed.sum())) and bool(allowed[rows, cols].all())
        assert close(found, expected[rows, cols])
        order = rows * shape[2] + cols
        assert bool((order[1:] > order[:-1]).all())
        rest = allowed.clone()
        rest[rows, cols] = False
        if found.numel() and bool(rest.any()):  # float32 sums may exchange neighbours
            assert float(expected[rest].abs().max()) <= float(found.abs().min()) * (1 + 1e-5)


def test_ties_go_to_the_lower_position_and_zeros_are_never_chosen(device):
    metadata = torch.zeros(6, 2, dtype=torch.uint8, device=device)
    dy, x = torch.ones(2, 6, device=device), torch.ones(2, 16, device=device)
    x[:, 8:] = 0
    rows, cols, found = growth.largest_gradients(dy, x, metadata, "unstructured", 6, 16, 10)
    assert rows.tolist() == [0] * 8 + [1] * 2 and cols.tolist() == [*range(8), 0, 1]
    assert found.tolist() == [2.0] * 10
    assert growth.largest_gradients(dy, x, metadata, "unstructured", 6, 16, 100).gradient.numel() == 48
    assert growth.largest_gradients(dy[:0], x[:0], metadata, "unstructured", 6, 16, 5).rows.numel() == 0
    with pytest.raises(UserError, match="where"):
        growth.largest_gradients(dy, x, metadata, "unstructured", 6, 16, 5, "all")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 1), (3, 5, 130), (2100, 8)), ids=str)
def test_scaled_columns(device, shape, dtype):
    h, dy = (torch.randn(shape).to(device, dtype) for _ in range(2))
    h = packed_cases.inside_nan(h.cpu()).to(device)
    scale = torch.randn(shape[-1], device=device)
    packed_cases.assert_close(columns.scale_columns(h, scale), h.double() * scale.double())
    dh, ds = columns.scale_columns_grad(dy, h, scale)
    assert dh.dtype == dtype and ds.dtype == torch.float32
    packed_cases.assert_close(dh, dy.double() * scale.double())
    assert close(ds, (h.double() * dy.double()).flatten(0, -2).sum(0))


def test_scaling_columns_goes_through_the_kernels(device, monkeypatch):
    """What DCFT calls: differentiable, and plain torch where another backend is asked for."""
    h, scale = (torch.randn(shape, device=device).requires_grad_() for shape in ((2, 9, 12), (12,)))
    dy, calls = torch.randn(2, 9, 12, device=device), []
    for name in ("scale_columns", "scale_columns_grad"):
        real = getattr(columns, name)
        monkeypatch.setattr(columns, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])

    def run():
        y = dispatched.scale_columns(h, scale)
        return y.detach(), *torch.autograd.grad(y, (h, scale), dy)

    found = run()
    assert calls == ["scale_columns", "scale_columns_grad"]
    monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 2


def test_columns_without_tokens_and_of_wrong_shapes(device):
    empty, scale = torch.empty(0, 6, device=device), torch.ones(6, device=device)
    dh, ds = columns.scale_columns_grad(empty, empty, scale)
    assert dh.shape == (0, 6) and ds.tolist() == [0.0] * 6 and columns.scale_columns(empty, scale).shape == (0, 6)
    with pytest.raises(UserError, match="scale"):
        columns.scale_columns(torch.ones(2, 5, device=device), scale)
    with pytest.raises(UserError, match="different shapes"):
        columns.scale_columns_grad(torch.ones(3, 6, device=device), torch.ones(2, 6, device=device), scale)
