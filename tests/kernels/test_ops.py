"""Every operation against a float64 dense reference: values, every gradient, odd shapes, every backend."""

import pytest
import torch

from helpers import compressed
from sparse_rt.errors import BackendError, UserError
from sparse_rt.kernels import backends, ops

PATTERNS = ("2:4", "unstructured", "4:8")
# (m, n): single row, fewer rows than a block, more rows than the reference's row block, no multiple of 8 or 32
SHAPES = ((1, 8), (5, 24), (300, 40), (17, 104))
BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(backends.FORCE_VARIABLE, request.param)
    return request.param


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(actual, expected, dtype):
    scale = expected.abs().max().clamp(min=1e-6)
    assert torch.isfinite(actual).all()
    assert ((actual.double() - expected).abs().max() / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_and_every_gradient(backend, pattern, shape, dtype):
    m, n = shape
    if backend == "native" and dtype == torch.float64:
        call = backends.Call("linear", pattern, m, n, 6, dtype, "cpu")
        assert "float64" in dict(backends.explain(call, backend).refused)["native"]
        return
    values, metadata, dense = compressed(m, n, pattern, dtype=dtype)
    x = torch.randn(2, 3, n).to(dtype).requires_grad_()
    bias = torch.randn(m).to(dtype).requires_grad_()
    values.requires_grad_()
    weight = dense.double().requires_grad_()
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()

    y = ops.linear(x, values, metadata, bias, pattern, m, n)
    expected = torch.nn.functional.linear(x64, weight, bias64)
    dy = torch.randn(2, 3, m).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())

    assert y.dtype == dtype and values.grad.dtype == dtype
    close(y, expected, dtype)
    close(x.grad, x64.grad, dtype)
    close(bias.grad, bias64.grad, dtype)
    mask = dense != 0
    close(values.grad.flatten(), weight.grad[mask], dtype)
    assert torch.equal(ops.decompress(values, metadata, pattern, m, n), dense)
    assert torch.equal(ops.gather(dense, metadata, pattern, m, n, values), values)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wide_values_are_rounded_once_and_get_an_unrounded_gradient(backend, pattern):
    m, n = 40, 64
    values, metadata, dense = compressed(m, n, pattern)
    values = (values * (1 + 1e-4)).requires_grad_()
    x = torch.randn(64, n).bfloat16()
    y = ops.linear(x, values, metadata, None, pattern, m, n)
    rounded = ops.linear(x, values.detach().bfloat16(), metadata, None, pattern, m, n)
    assert torch.equal(y, rounded) and y.dtype == torch.bfloat16
    dy = torch.randn(64, m).bfloat16()
    y.backward(dy)
    exact = (dy.double().T @ x.double())[dense != 0]
    assert values.grad.dtype == torch.float32
    # bfloat16 rounding of the result would leave about 4e-3
    assert ((values.grad.double().flatten() - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_double_backward(pattern):
    m, n = 6, 16
    values, metadata, _ = compressed(m, n, pattern, dtype=torch.float64)
    inputs = (torch.randn(3, n, dtype=torch.float64, requires_grad=True), values.requires_grad_())

    def forward(x, v):
        return ops.linear(x, v, metadata, None, pattern, m, n)

    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_empty_batch_and_strided_input(backend, pattern):
    m, n = 24, 32
    values, metadata, dense = compressed(m, n, pattern)
    empty = ops.linear(torch.randn(0, n), values, metadata, None, pattern, m, n)
    assert empty.shape == (0, m)
    strided = torch.randn(n, 7).T
    close(
        ops.linear(strided, values, metadata, None, pattern, m, n), strided.double() @ dense.double().T, torch.float32
    )
    dy = torch.randn(7, 2 * m)[:, ::2]
    close(ops.linear_t(dy, values, metadata, pattern, m, n), dy.double() @ dense.double(), torch.float32)
    grad = ops.values_grad(dy, strided, metadata, pattern, m, n, values)
    close(grad.flatten(), (dy.double().T @ strided.double())[dense != 0], torch.float32)
    nothing = ops.values_grad(dy[:0], strided[:0], metadata, pattern, m, n, values)
    assert nothing.shape == values.shape and not nothing.any()


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_full_and_nearly_empty_weights(backend, sparsity):
    values, metadata, dense = compressed(33, 41, "unstructured", sparsity)
    x = torch.randn(4, 41)
    close(ops.linear(x, values, metadata, None, "unstructured", 33, 41), x.double() @ dense.double().T, torch.float32)
    none = values[:0], torch.zeros_like(metadata)
    assert not ops.linear(x, *none, None, "unstructured", 33, 41).any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_operators_obey_their_contract(pattern):
    m, n = 12, 24
    values, metadata, _ = compressed(m, n, pattern)
    x, dy, bias = torch.randn(3, n), torch.randn(3, m), torch.randn(m)
    check = torch.library.opcheck
    check(torch.ops.sparse_rt.linear, (x.requires_grad_(), values.requires_grad_(), metadata, bias, pattern, m, n))
    check(torch.ops.sparse_rt.linear_t, (dy.requires_grad_(), values, metadata, pattern, m, n))
    check(torch.ops.sparse_rt.values_grad, (dy, x, metadata, pattern, m, n, values.detach()))
    check(torch.ops.sparse_rt.decompress, (values, metadata, pattern, m, n))
    check(torch.ops.sparse_rt.gather, (torch.randn(m, n).requires_grad_(), metadata, pattern, m, n, values.detach()))


def test_compiled_layer_equals_eager_without_graph_breaks():
    values, metadata, _ = compressed(16, 32, "2:4")

    def forward(x):
        return torch.relu(ops.linear(x, values, metadata, None, "2:4", 16, 32)) * 2

    x = torch.randn(5, 32)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))


def test_unknown_forced_backend_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv(backends.FORCE_VARIABLE, "fpga")
    values, metadata, _ = compressed(4, 8, "2:4")
    with pytest.raises(UserError, match=r"fpga.*known are native, reference, triton"):
        ops.decompress(values, metadata, "2:4", 4, 8)


def test_when_nothing_fits_the_error_lists_every_refusal(monkeypatch):
    monkeypatch.setenv(backends.FORCE_VARIABLE, "native")
    values, metadata, _ = compressed(4, 8, "2:4", dtype=torch.float64)
    with pytest.raises(BackendError, match=r"native: .*float64.*reference: SPARSE_RT_BACKEND=native"):
        ops.decompress(values, metadata, "2:4", 4, 8)


def test_a_backend_of_another_package_can_join_and_a_duplicate_name_is_refused(monkeypatch):
    registry = dict(backends._BACKENDS)
    monkeypatch.setattr(backends, "_BACKENDS", registry)

    def other(values, metadata, pattern, m, n):
        return torch.full((m, n), 7.0)

    backends.register_backend("decompress", name="other", priority=99, can_run=lambda call: None)(other)
    values, metadata, _ = compressed(4, 8, "2:4")
    assert (ops.decompress(values, metadata, "2:4", 4, 8) == 7).all()
    with pytest.raises(UserError, match="is defined by"):
        backends.register_backend("decompress", name="other")(lambda *arguments: None)
    backends.select.cache_clear()
