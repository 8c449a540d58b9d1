"""The dense baseline of the benchmark multiplies correctly: a wrong baseline would make every ratio a lie."""

import dense_baseline
import pytest
import torch

pytestmark = pytest.mark.skipif(
    dense_baseline.unavailable_reason() is not None, reason=str(dense_baseline.unavailable_reason())
)

# Every block of tokens with a kernel of its own, sizes between them, and several blocks.
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 49, 64)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def before_poison(rows, columns):
    """A random bf16 matrix with NaN behind its last element."""
    memory = torch.full((rows * columns + 64,), torch.nan, dtype=torch.bfloat16)
    memory[: rows * columns] = torch.randn(rows * columns)
    return memory[: rows * columns].view(rows, columns)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (15, 2), (16, 64), (17, 33), (50, 130), (130, 31), (200, 32)])
def test_agrees_with_float64(m, n, threads):
    weight = before_poison(m, n)
    packed = dense_baseline.pack(weight)
    for tokens in TOKENS:
        x = before_poison(tokens, n)
        exact = x.double() @ weight.double().t()
        error = (dense_baseline.linear(x, packed, m, n).double() - exact).abs()
        # Half a unit in the last place of the bf16 result, and the float32 sum.
        allowed = exact.abs() * 2**-8 + 1e-6 * x.double().abs() @ weight.double().abs().t()
        assert (error <= allowed).all(), f"{tokens} tokens"


def test_several_panels_of_a_large_weight_are_shared_by_threads(threads):
    weight, x = torch.randn(1040, 520).bfloat16(), torch.randn(4, 520).bfloat16()
    y = dense_baseline.linear(x, dense_baseline.pack(weight), 1040, 520)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=2**-7, atol=1e-3)


def test_refuses_what_it_cannot_read():
    weight = torch.randn(16, 32)
    with pytest.raises(ValueError, match=r"contiguous bfloat16 .* got torch\.float32"):
        dense_baseline.pack(weight)
    with pytest.raises(ValueError, match="contiguous"):
        dense_baseline.pack(weight.bfloat16().t())
    packed = dense_baseline.pack(weight.bfloat16())
    with pytest.raises(ValueError, match="do not fit"):
        dense_baseline.linear(torch.zeros(1, 64, dtype=torch.bfloat16), packed, 16, 64)
