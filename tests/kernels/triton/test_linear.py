"""linear and linear_t against float64: every pattern, odd shapes, every dtype, and the choice between two ways."""

import pytest
import torch

import packed_cases
from sparse_rt.errors import UserError
from sparse_rt.kernels import backends, ops
from sparse_rt.kernels.backends import Call

pytest.importorskip("triton")
from sparse_rt.kernels.triton import linear as kernels

# (pattern, m, n, sparsity): one row, no multiple of 8, 32 or 128 columns, several blocks of columns, whole blocks
CASES = (
    ("2:4", 1, 4, None),
    ("2:4", 17, 60, None),
    ("2:4", 33, 132, None),
    ("2:4", 64, 256, None),
    ("4:8", 17, 64, None),
    ("4:8", 33, 264, None),
    ("unstructured", 1, 4, 0.5),
    ("unstructured", 17, 60, 0.5),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 33, 130, 0.9),
    ("unstructured", 33, 130, 0.0),
    ("unstructured", 64, 256, 0.5),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on(device, case, dtype):
    weight = packed_cases.weight(*case, dtype)
    return weight.values.to(device), weight.metadata.to(device), weight.dense.to(device), weight.shape


def check(device, case, tokens, dtype):
    values, metadata, dense, shape = on(device, case, dtype)
    _, m, n = shape
    x, dy, bias = (torch.randn(size).to(device, dtype) for size in ((tokens, n), (tokens, m), (m,)))
    y = kernels.linear(x, values, metadata, bias, *shape)
    packed_cases.assert_close(y, x.double() @ dense.T + bias.double(), "linear", case, tokens)
    packed_cases.assert_close(kernels.linear_t(dy, values, metadata, *shape), dy.double() @ dense, "linear_t", case)
    assert y.dtype == dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pattern_and_shape(device, case):
    for tokens in (1, 3, 17):
        check(device, case, tokens, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (CASES[2], CASES[9]), ids=str)
def test_every_dtype_and_more_tokens_than_a_tile(device, case, dtype):
    for tokens in (40, 65):
        check(device, case, tokens, dtype)


@pytest.mark.parametrize("case", (CASES[1], CASES[7]), ids=str)
def test_padding_bits_are_not_read(device, case):
    values, metadata, dense, shape = on(device, case, torch.float32)
    poisoned = metadata.clone()
    poisoned[:, -1] |= 0xE0
    assert not torch.equal(poisoned, metadata)
    x, dy = torch.randn(3, shape[2], device=device), torch.randn(3, shape[1], device=device)
    packed_cases.assert_close(kernels.linear(x, values, poisoned, None, *shape), x.double() @ dense.T)
    packed_cases.assert_close(kernels.linear_t(dy, values, poisoned, *shape), dy.double() @ dense)


@pytest.mark.parametrize("case", (CASES[2], CASES[9]), ids=str)
def test_strided_inputs_inside_nan_and_leading_dimensions(device, case):
    values, metadata, dense, shape = on(device, case, torch.float32)
    _, m, n = shape
    for x in (
        packed_cases.inside_nan(torch.randn(5, n)).to(device),
        torch.randn(n, 5, device=device).T,
        torch.randn(2, 3, n, device=device).transpose(0, 1),
        torch.randn(n, device=device),
    ):
        packed_cases.assert_close(kernels.linear(x, values, metadata, None, *shape), x.double() @ dense.T)
    dy = torch.randn(4, 2 * m, device=device)[:, ::2]
    packed_cases.assert_close(kernels.linear_t(dy, values, metadata, *shape), dy.double() @ dense)


@pytest.mark.parametrize("case", (CASES[2], CASES[9]), ids=str)
def test_wide_values_are_rounded_once(device, case):
    values, metadata, _, shape = on(device, case, torch.float32)
    for tokens, run in ((3, kernels.linear), (3, ops.linear), (65, ops.linear)):
        x = torch.randn(tokens, shape[2]).to(device, torch.bfloat16)
        y = run(x, values, metadata, None, *shape)
        assert torch.equal(y, run(x, values.bfloat16(), metadata, None, *shape)) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("case", (CASES[2], CASES[9]), ids=str)
def test_no_tokens_no_rows_no_values(device, case):
    values, metadata, _, shape = on(device, case, torch.float32)
    pattern, m, n = shape
    assert kernels.linear(torch.randn(0, n, device=device), values, metadata, None, *shape).shape == (0, m)
    assert kernels.linear_t(torch.randn(2, 0, m, device=device), values, metadata, *shape).shape == (2, 0, n)
    x = torch.randn(2, n, device=device)
    assert kernels.linear(x, values[:0], metadata[:0], None, pattern, 0, n).shape == (2, 0)
    dx = kernels.linear_t(torch.randn(2, 0, device=device), values[:0], metadata[:0], pattern, 0, n)
    assert dx.shape == (2, n) and not dx.any()


@pytest.mark.parametrize("pattern", ("2:4", "4:8", "unstructured"))
def test_the_operations_choose_it_and_both_of_its_ways_agree(device, pattern):
    case = (pattern, 48, 256, 0.7)
    values, metadata, dense, shape = on(device, case, torch.bfloat16)
    _, m, n = shape
    choice = backends.explain(Call("linear", pattern, m, n, 1, torch.bfloat16, device))
    assert choice.backend.name == "triton"
    for tokens in (2, 65):  # decoded in the kernel, expanded into scratch
        x = torch.randn(tokens, n).to(device, torch.bfloat16).requires_grad_()
        bias = torch.randn(m).to(device, torch.bfloat16)
        y = ops.linear(x, values, metadata, bias, *shape)
        packed_cases.assert_close(y, x.double() @ dense.T + bias.double(), tokens)
        dy = torch.randn(tokens, m).to(device, torch.bfloat16)
        y.backward(dy)
        packed_cases.assert_close(x.grad, dy.double() @ dense, tokens)


def test_metadata_of_another_shape_is_refused(device):
    values, metadata, _, shape = on(device, CASES[7], torch.float32)
    with pytest.raises(UserError, match=r"weight_bitmask of a unstructured weight \(17, 60\) is uint8 \(17, 8\)"):
        kernels.linear(torch.randn(1, 60, device=device), values, metadata[:, :7], None, *shape)
