"""dY^T X at the kept positions against float64: every pattern, odd shapes, every dtype, any number of tokens."""

import pytest
import torch

import packed_cases
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops

pytest.importorskip("triton")
from sparse_rt.kernels.triton import gradient

# (pattern, m, n, sparsity): one row, no multiple of 8, 64 or 128, several blocks and tiles, nothing and all kept
CASES = (
    ("2:4", 1, 4, None),
    ("2:4", 17, 60, None),
    ("2:4", 70, 264, None),
    ("4:8", 33, 264, None),
    ("unstructured", 1, 4, 0.5),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 33, 130, 0.0),
    ("unstructured", 130, 257, 0.9),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on(device, case, dtype):
    """(weight on ``device``, its mask, (pattern, m, n))"""
    weight = packed_cases.weight(*case, dtype)
    mask = get_format(weight.pattern).unpack_mask(weight.metadata, weight.m, weight.n)
    return weight.values.to(device), weight.metadata.to(device), mask.to(device), weight.shape


def tokens_of(device, m, n, tokens, dtype):
    return torch.randn(tokens, m).to(device, dtype), torch.randn(tokens, n).to(device, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pattern_and_shape(device, case):
    values, metadata, mask, shape = on(device, case, torch.bfloat16)
    for tokens in (1, 17, 65):
        dy, x = tokens_of(device, *shape[1:], tokens, torch.bfloat16)
        like = torch.empty_like(values, dtype=torch.float32)
        grad = gradient.values_grad(dy, x, metadata, *shape, like)
        packed_cases.assert_close(grad.flatten(), (dy.double().T @ x.double())[mask], case, tokens)


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (CASES[2], CASES[7]), ids=str)
def test_every_dtype_and_result(device, case, dtype, result):
    values, metadata, mask, shape = on(device, case, dtype)
    dy, x = tokens_of(device, *shape[1:], 70, dtype)
    grad = gradient.values_grad(dy, x, metadata, *shape, torch.empty_like(values, dtype=result))
    assert grad.dtype == result and grad.shape == values.shape
    packed_cases.assert_close(grad.flatten(), (dy.double().T @ x.double())[mask], case)


@pytest.mark.parametrize("case", (CASES[1], CASES[7]), ids=str)
def test_strided_inputs_inside_nan_mixed_dtypes_and_padding_bits(device, case):
    values, metadata, mask, shape = on(device, case, torch.float32)
    _, m, n = shape
    poisoned = metadata.clone()
    poisoned[:, -1] |= 0xE0 if n % 8 else 0
    dy, x = tokens_of(device, m, n, 6, torch.float32)
    expected = (dy.double().T @ x.double())[mask]
    for one, two in (
        (packed_cases.inside_nan(dy.cpu()).to(device), packed_cases.inside_nan(x.cpu()).to(device)),
        (dy.T.contiguous().T, x.T.contiguous().T),
        (dy.view(2, 3, m), x.view(2, 3, n)),
    ):
        found = gradient.values_grad(one, two, poisoned, *shape, values)
        packed_cases.assert_close(found.flatten(), expected)
    mixed = gradient.values_grad(dy.bfloat16(), x, metadata, *shape, values)
    packed_cases.assert_close(mixed.flatten(), (dy.bfloat16().double().T @ x.double())[mask])


def test_no_tokens_and_empty_weights(device):
    for case in (CASES[1], CASES[5]):
        values, metadata, _, shape = on(device, case, torch.float32)
        dy, x = tokens_of(device, *shape[1:], 0, torch.float32)
        assert torch.equal(gradient.values_grad(dy, x, metadata, *shape, values), torch.zeros_like(values))
    empty = torch.empty(0, device=device)
    found = gradient.values_grad(
        torch.ones(3, 0, device=device),
        torch.ones(3, 8, device=device),
        torch.empty(0, 1, dtype=torch.uint8, device=device),
        *("unstructured", 0, 8, empty),
    )
    assert found.shape == (0,)


def test_inputs_that_do_not_belong_together_are_refused(device):
    values, metadata, _, shape = on(device, CASES[1], torch.float32)
    dy, x = tokens_of(device, *shape[1:], 4, torch.float32)
    with pytest.raises(UserError, match="4 tokens and x has 3"):
        gradient.values_grad(dy, x[:3], metadata, *shape, values)
    with pytest.raises(UserError, match="do not fit"):
        gradient.values_grad(x, dy, metadata, *shape, values)
    with pytest.raises(UserError, match="float64"):
        gradient.values_grad(dy.double(), x.double(), metadata, *shape, values)


def test_the_gradient_of_values_in_float32_reaches_autograd(device, monkeypatch):
    monkeypatch.setenv("SPARSE_RT_BACKEND", "triton")
    values, metadata, mask, shape = on(device, CASES[2], torch.bfloat16)
    wide = values.float().requires_grad_()
    x = torch.randn(5, shape[2], device=device, dtype=torch.bfloat16)
    ops.linear(x, wide, metadata, None, *shape).float().square().sum().backward()
    y = ops.linear(x, wide.detach(), metadata, None, *shape)
    dy = (2 * y.float()).bfloat16()
    packed_cases.assert_close(wide.grad.flatten(), (dy.double().T @ x.double())[mask])
