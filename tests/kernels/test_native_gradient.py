"""The tile kernels of dY^T X and the factor kernels agree with float64, whatever the shape, dtype, pattern and number
of threads, and never touch anything outside their buffers."""

import ctypes
import itertools

import pytest
import torch

from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels.native import gradient, library
from sparse_rt.kernels.native import ops as native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Not multiples of 6 rows or 64 columns; several blocks of 96 rows; groups that straddle the blocks.
SHAPES = ((1, 4), (6, 64), (7, 36), (97, 72), (200, 132), (210, 1100))
PATTERNS = ("2:4", "1:4", "unstructured")


@pytest.fixture(autouse=True)
def threads():
    """One thread unless a test sets another number: on a busy machine a team mostly waits."""
    if not gradient.can_run(torch.zeros(1)):
        pytest.skip("no tile kernels for this processor")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["tiles", "dots"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(gradient, "KERNEL", request.param)
    return request.param


def case(m, n, pattern, density=0.5, dtype=torch.bfloat16, seed=0):
    """(values, metadata, mask, dense float64) with an empty and a full row where the pattern allows it."""
    torch.manual_seed(seed)
    fmt = get_format(pattern)
    if pattern == "unstructured":
        mask = torch.rand(m, n) < density
        mask[m // 2] = False
        mask[m // 3] = True
    else:
        mask = fmt.mask_from_scores(torch.rand(m, n))
    weight = torch.where(mask, torch.randn(m, n), 0).to(dtype)
    return *fmt.compress(weight, mask), mask, weight.double()


def shapes(pattern):
    return [(m, n) for m, n in SHAPES if not get_format(pattern).refuse_shape(m, n)]


def error(actual, expected):
    """Largest error relative to the largest value, or to 8 where a sum of normal products came out smaller."""
    if expected.numel() == 0:
        return 0.0
    return float((actual.double().flatten() - expected.flatten()).abs().max() / expected.abs().max().clamp_min(8))


def allowed(dtype):
    """The rounding of the result, or what float32 sums of up to 300 products lose."""
    return max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_grad_equals_float64(kernel, pattern, dtype, result):
    for (m, n), tokens in itertools.product(shapes(pattern), (1, 2, 65, 300)):
        values, metadata, mask, _ = case(m, n, pattern)
        dy, x = torch.randn(tokens, m).to(dtype), torch.randn(tokens, n).to(dtype)
        expected = (dy.double().T @ x.double())[mask]
        grad = native.values_grad(dy, x, metadata, pattern, m, n, torch.empty_like(values, dtype=result))
        assert grad.dtype == result and grad.shape == values.shape
        assert error(grad, expected) <= allowed(result), (m, n, tokens)


def test_values_grad_of_mixed_dtypes_strided_and_batched_inputs():
    values, metadata, mask, _ = case(97, 72, "unstructured")
    dy, x = torch.randn(97, 30).T.double(), torch.randn(30, 144)[:, ::2].double()
    expected = (dy.T @ x)[mask]
    like = torch.empty(values.shape)
    arguments = metadata, "unstructured", 97, 72, like
    assert error(native.values_grad(dy.float(), x.float(), *arguments), expected) < 1e-6
    batched = native.values_grad(dy.float().reshape(5, 6, 97), x.float().reshape(5, 6, 72), *arguments)
    assert error(batched, expected) < 1e-6
    mixed = (dy.bfloat16().double().T @ x)[mask]
    assert error(native.values_grad(dy.bfloat16(), x.float(), *arguments), mixed) < 1e-6


@pytest.mark.parametrize("result", DTYPES, ids=str)
def test_more_tokens_than_are_packed_at_once_are_rounded_once(kernel, monkeypatch, result):
    monkeypatch.setattr(gradient, "TOKENS", 32)
    values, metadata, mask, _ = case(97, 72, "unstructured")
    dy, x = torch.randn(150, 97).bfloat16(), torch.randn(150, 72).bfloat16()
    grad = native.values_grad(dy, x, metadata, "unstructured", 97, 72, torch.empty_like(values, dtype=result))
    expected = (dy.double().T @ x.double())[mask]
    assert error(grad, expected) <= allowed(result)
    assert (grad.double() - expected.to(result).double()).abs().max() <= 2 * torch.finfo(
        result
    ).eps * expected.abs().max()


def test_no_tokens_and_no_values_give_zeros():
    values, metadata, _, _ = case(7, 36, "2:4")
    grad = native.values_grad(torch.empty(0, 7), torch.empty(0, 36), metadata, "2:4", 7, 36, values)
    assert grad.shape == values.shape and not grad.any()
    empty = torch.zeros(7, 5, dtype=torch.uint8)
    grad = native.values_grad(torch.ones(3, 7), torch.ones(3, 36), empty, "unstructured", 7, 36, torch.empty(0))
    assert grad.shape == (0,)
    da, db = gradient.factors_grad(
        torch.empty(0, 7), torch.empty(0, 36), values, metadata, "2:4", 7, 36, torch.ones(1, 36), torch.ones(7), 2.0
    )
    assert not da.any() and not db.any()


def test_results_do_not_depend_on_the_number_of_threads(kernel, threads):
    m, n, tokens = 400, 520, 130
    values, metadata, _, _ = case(m, n, "unstructured")
    dy, x = torch.randn(tokens, m).bfloat16(), torch.randn(tokens, n).bfloat16()
    a, b = torch.randn(5, n), torch.randn(m)
    found = []
    for count in (1, 2, 3, 3):
        threads(count)
        grad = native.values_grad(dy, x, metadata, "unstructured", m, n, torch.empty(values.shape))
        factors = gradient.factors_grad(dy, x, values, metadata, "unstructured", m, n, a, b, 2.0)
        out = gradient.apply_factors(torch.empty_like(values), values, metadata, "unstructured", m, n, a, b, 2.0)
        found.append((grad, *factors, out))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_factors_equal_float64(pattern, dtype):
    for (m, n), with_base in itertools.product(shapes(pattern), (True, False)):
        values, metadata, mask, dense = case(m, n, pattern, dtype=dtype)
        for groups in {1, m} | ({10} if m % 10 == 0 else set()):
            a, b = torch.randn(groups, n), torch.randn(m)
            factor = with_base + 2.0 * b.double()[:, None] * a.double().repeat_interleave(m // groups, 0)
            for result in (dtype, torch.float32):
                out = torch.empty_like(values, dtype=result)
                gradient.apply_factors(out, values, metadata, pattern, m, n, a, b, 2.0, with_base)
                expected = (dense * factor)[mask]
                bound = max(torch.finfo(result).eps, 5e-7) * expected.abs() + 1e-6
                assert bool(((out.double().flatten() - expected).abs() <= bound).all()), (m, n, groups, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_factor_gradients_equal_float64_autograd(kernel, monkeypatch, pattern, dtype):
    for (m, n), block in itertools.product(shapes(pattern), (2048, 32)):
        monkeypatch.setattr(gradient, "TOKENS", block)
        values, metadata, _, dense = case(m, n, pattern, dtype=dtype)
        dy, x = torch.randn(70, m).to(dtype), torch.randn(70, n).to(dtype)
        for groups in {1, m} | ({10} if m % 10 == 0 else set()):
            a, b = (t.double().requires_grad_() for t in (torch.randn(groups, n), torch.randn(m)))
            weight = dense * (1 + 2.0 * b[:, None] * a.repeat_interleave(m // groups, 0))
            (x.double() @ weight.T).backward(dy.double())
            da, db = gradient.factors_grad(
                dy, x, values, metadata, pattern, m, n, a.detach().float(), b.detach().float(), 2.0
            )
            assert error(da, a.grad) < 2e-6 and error(db, b.grad) < 2e-6, (m, n, groups)


def test_what_contradicts_the_metadata_is_refused():
    values, metadata, _, _ = case(97, 72, "unstructured")
    dy, x, a, b = torch.ones(3, 97), torch.ones(3, 72), torch.ones(1, 72), torch.ones(97)
    weight = metadata, "unstructured", 97, 72
    for wrong in (values[:-1], torch.cat((values, values[:1]))):
        with pytest.raises(FormatError, match="marks"):
            native.values_grad(dy, x, *weight, wrong)
        with pytest.raises(FormatError, match="marks"):
            gradient.factors_grad(dy, x, wrong, *weight, a, b, 1.0)
        with pytest.raises(FormatError, match="marks"):
            gradient.apply_factors(torch.empty_like(wrong), wrong, *weight, a, b, 1.0)
    with pytest.raises(UserError, match="tokens"):
        native.values_grad(dy[:2], x, *weight, values)
    with pytest.raises(UserError, match="divisor"):
        gradient.factors_grad(dy, x, values, *weight, torch.ones(2, 72), b, 1.0)
    with pytest.raises(FormatError, match="metadata"):
        native.values_grad(dy, x, metadata[:, :-1], "unstructured", 97, 72, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_no_buffer_is_read_or_written_past_its_end(kernel, guarded, pattern, dtype):
    """Every buffer ends at a protected page: one byte too far ends the process."""
    handle, number, nibbles = library.load().handle, gradient.NUMBERS[dtype], pattern == "2:4"
    for (m, n), tokens in itertools.product(shapes(pattern), (1, 66, 67)):
        values, metadata, mask, _ = case(m, n, pattern, dtype=dtype)
        dy, x = torch.randn(tokens, m).to(dtype), torch.randn(tokens, n).to(dtype)
        a, b = torch.randn(1, n), torch.randn(m)
        size = handle.srt_grad_bytes(m, n, tokens, number, 1)
        work = guarded(torch.empty(size, dtype=torch.uint8)), size, 2
        inputs = guarded(dy), guarded(x), tokens, guarded(metadata), nibbles
        out = guarded(torch.empty_like(values))
        where = values.numel(), m, n
        assert handle.srt_values_grad(*inputs, out, *where, number, number, 0, kernel, *work) == values.numel()
        found = (
            torch.frombuffer(bytearray(ctypes.string_at(out, values.nbytes)), dtype=dtype) if values.numel() else values
        )
        assert error(found, (dy.double().T @ x.double())[mask]) <= allowed(dtype)
        factors = guarded(a), guarded(b), 2.0, 1
        results = guarded(a), guarded(b)
        done = handle.srt_factors_grad(
            *inputs, guarded(values), *where, number, number, *factors, *results, 0, kernel, *work
        )
        assert done == values.numel()
        starts = guarded(torch.empty(m + 1, dtype=torch.int64))
        weight = guarded(values), number, values.numel(), guarded(metadata), nibbles, m, n
        assert handle.srt_factors_apply(*weight, *factors, 1.0, out, number, starts, 2) == values.numel()


def test_nonsense_is_answered_and_not_run():
    handle = library.load().handle
    nonsense = ((-1, 4, 1, 0, 0), (4, 4, 0, 0, 0), (4, 4, 1, 3, 0), (4, 4, 1, 0, 3), (4, 2**40, 1, 0, 0))
    for m, n, tokens, number, groups in nonsense:
        assert handle.srt_grad_bytes(m, n, tokens, number, groups) == -1
    assert handle.srt_values_grad(0, 0, 1, 0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 0, 0, 1) == -1
    assert handle.srt_factors_grad(0, 0, 1, 0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0, 1) == -1
    assert handle.srt_factors_apply(0, 0, 0, 0, 1, 4, 6, 0, 0, 1.0, 1, 1.0, 0, 0, 0, 1) == -1


def test_other_instruction_sets_take_the_dense_products():
    values, metadata, mask, _ = case(97, 72, "unstructured")
    dy, x = torch.randn(30, 97), torch.randn(30, 72)
    handle = library.load()
    for isa in library.ISAS:
        try:
            handle.use_isa(isa)
        except BackendError:
            continue
        try:
            assert gradient.can_run(x) == isa.startswith("avx512")
            grad = native.values_grad(dy, x, metadata, "unstructured", 97, 72, torch.empty(values.shape))
        finally:
            handle.use_isa("")
        assert error(grad, (dy.double().T @ x.double())[mask]) < 1e-6
