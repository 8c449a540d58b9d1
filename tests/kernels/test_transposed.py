"""dX of frozen weights with a transposable mask goes through the packed W^T, of all others as before."""

import pytest
import torch
import torch.nn.functional as F

from sparse_rt.formats import get_format
from sparse_rt.formats.nm import is_transposable, kept_of
from sparse_rt.kernels import ops, packed, transposed
from sparse_rt.nn import SparseLinear
from sparse_rt.pruning.transposable import TransposableFormat

M, N = 64, 96
needs_packing = pytest.mark.skipif(
    packed.refusal("2:4", N, M, torch.float32, "cpu", 0.5) is not None, reason="no packed product on this processor"
)


def weight(pattern, dtype=torch.float32, transposable=True, m=M, n=N):
    fmt = get_format(pattern)
    dense = torch.randn(m, n)
    mask = (TransposableFormat(fmt) if transposable else fmt).mask_from_scores(dense.abs())
    dense = torch.where(mask, dense, 0).to(dtype)
    return dense, *fmt.compress(dense, mask)


def input_gradient(x, values, metadata, pattern, dy, shape=(M, N)):
    y = ops.linear(x, values, metadata, None, pattern, *shape)
    return torch.autograd.grad(y, x, dy)[0]


@pytest.fixture
def products(monkeypatch):
    """Numbers of tokens of the products with W^T."""
    seen = []
    before = packed.packed_linear
    monkeypatch.setattr(packed, "packed_linear", lambda x, *rest: seen.append(len(x)) or before(x, *rest))
    return seen


@needs_packing
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "8:16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_the_gradient_is_the_product_in_float64(pattern, dtype, tokens, products):
    dense, values, metadata = weight(pattern, dtype)
    x, dy = torch.randn(tokens, N).to(dtype).requires_grad_(), torch.randn(tokens, M).to(dtype)
    found = input_gradient(x, values, metadata, pattern, dy)
    exact = dy.double() @ dense.double()
    assert products == [tokens] and found.dtype == dtype
    assert (found.double() - exact).norm() < (2e-6 if dtype == torch.float32 else 4e-3) * exact.norm()


@needs_packing
def test_a_layer_in_training_takes_it_and_one_whose_values_are_trained_does_not(products):
    dense = torch.randn(M, N)
    mask = TransposableFormat(get_format("2:4")).mask_from_scores(dense.abs())
    linear = torch.nn.Linear(N, M, bias=False)
    linear.weight.data = torch.where(mask, dense, 0)
    layer = SparseLinear.from_dense(linear, "2:4", mask).train()
    for trained, count in ((False, 1), (True, 1)):
        layer.weight_values.requires_grad_(trained)
        x = torch.randn(3, N, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(3, M) @ linear.weight.data)
        assert len(products) == count


@needs_packing
def test_values_that_change_are_packed_anew_and_unchanged_ones_once(products, monkeypatch):
    dense, values, metadata = weight("2:4")
    made = []
    before = transposed._made
    monkeypatch.setattr(transposed, "_made", lambda *given: made.append(1) or before(*given))
    x, dy = torch.randn(3, N, requires_grad=True), torch.randn(3, M)
    for _ in range(2):
        torch.testing.assert_close(input_gradient(x, values, metadata, "2:4", dy), dy @ dense)
    assert len(made) == 1
    values.mul_(2)
    torch.testing.assert_close(input_gradient(x, values, metadata, "2:4", dy), dy @ dense * 2)
    values.data = values.data * 2
    torch.testing.assert_close(input_gradient(x, values, metadata, "2:4", dy), dy @ dense * 4)
    assert len(made) == 3 and len(products) == 4


@needs_packing
def test_data_exchanged_more_than_once_is_seen(products):
    """The allocator likes to give the old address again, and an exchange of data does not count as a change."""
    dense, values, metadata = weight("2:4")
    x, dy = torch.randn(3, N, requires_grad=True), torch.randn(3, M)
    input_gradient(x, values, metadata, "2:4", dy)
    for factor in (2, 3, 4, 5):
        values.data = torch.zeros_like(values)
        values.data = get_format("2:4").compress(dense * factor, dense != 0)[0]
        torch.testing.assert_close(input_gradient(x, values, metadata, "2:4", dy), dy @ dense * factor)
    assert len(products) == 5


@needs_packing
def test_sharded_models_keep_no_second_form(products, monkeypatch):
    monkeypatch.setattr(transposed, "shards_models", lambda: True)
    dense, values, metadata = weight("2:4")
    x, dy = torch.randn(3, N, requires_grad=True), torch.randn(3, M)
    torch.testing.assert_close(input_gradient(x, values, metadata, "2:4", dy), dy @ dense)
    assert products == [] and values not in transposed._entries


@needs_packing
def test_what_is_kept_goes_with_the_weight(products):
    _, values, metadata = weight("2:4")
    x, dy = torch.randn(3, N, requires_grad=True), torch.randn(3, M)
    before = len(transposed._entries)
    input_gradient(x, values, metadata, "2:4", dy)
    assert len(transposed._entries) == before + 1
    del values
    assert len(transposed._entries) == before


@pytest.mark.parametrize("case", ["mask", "trained", "unstructured", "rows", "wide values"])
def test_everything_else_takes_the_ordinary_way(case, products):
    pattern = "unstructured" if case == "unstructured" else "2:4"
    shape = (M + 2, N) if case == "rows" else (M, N)
    dense, values, metadata = weight("2:4", transposable=case not in ("mask", "rows"), m=shape[0])
    if case == "unstructured":
        values, metadata = get_format(pattern).compress(dense, dense != 0)
    if case == "trained":
        values.requires_grad_()
    x, dy = torch.randn(3, N, requires_grad=True), torch.randn(3, shape[0])
    if case == "wide values":
        x, dy = x.detach().bfloat16().requires_grad_(), dy.bfloat16()
    found = input_gradient(x, values, metadata, pattern, dy, shape=shape)
    assert products == []
    torch.testing.assert_close(
        found.float(), dy.float() @ dense, rtol=0.02, atol=0.1 if case == "wide values" else 1e-4
    )


@needs_packing
def test_a_gradient_of_the_gradient_is_still_there(products):
    dense, values, metadata = weight("2:4", torch.float64)
    x, dy = torch.randn(3, N, dtype=torch.float64, requires_grad=True), torch.randn(3, M, dtype=torch.float64)
    dy.requires_grad_()
    y = ops.linear(x, values, metadata, None, "2:4", M, N)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx.square().sum(), dy)
    torch.testing.assert_close(ddy, 2 * F.linear(dy.detach() @ dense, dense))
    assert products == []


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:5"])
def test_masks_of_other_choosers_are_seen_not_to_be_transposable(pattern):
    fmt = get_format(pattern)
    size = 8 * fmt.group
    mask = fmt.mask_from_scores(torch.rand(size, size))
    assert not is_transposable(mask, kept_of(fmt), fmt.group)
    assert is_transposable(TransposableFormat(fmt).mask_from_scores(torch.rand(size, size)), kept_of(fmt), fmt.group)
