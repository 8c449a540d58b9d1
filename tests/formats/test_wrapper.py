"""Block-diagonal matrices around a core: the product, and what of a stored wrapper is refused."""

import pytest
import torch

from sparse_rt.errors import FormatError
from sparse_rt.formats.wrapper import Wrapper, apply_blocks, check_data, check_header, shapes


def blocks(count, size, dtype=torch.float32, seed=0):
    return torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_every_block_multiplies_its_part_of_a_vector(shape):
    matrix, x = blocks(3, 4), torch.randn(shape)
    assert torch.allclose(apply_blocks(matrix, x), x @ torch.block_diag(*matrix).T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dense_weight_is_the_product_rounded_once(dtype):
    wrapper, core = Wrapper(blocks(2, 3, dtype), blocks(4, 2, dtype, seed=1)), torch.randn(6, 8).to(dtype)
    exact = torch.block_diag(*wrapper.out.double()) @ core.double() @ torch.block_diag(*wrapper.inner.double())
    found = wrapper.dense(core)
    assert found.dtype == dtype and found.is_contiguous()
    # Half a unit in the last place, and float32's own rounding where the product is a difference of larger numbers.
    assert torch.allclose(found.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)


def test_block_sizes_are_read_off_the_shapes():
    found = shapes(12, 8, 3, 4)
    assert found == ((4, 3, 3), (2, 4, 4))
    assert check_header("w", [torch.float16] * 2, found, 12, 8, torch.float16) == (3, 4)


@pytest.mark.parametrize(
    "dtypes,found,message",
    [
        ("hh", ((4, 3, 3), (2, 4, 4)), r"w.weight_wrapper_out is torch.float16 .* needs torch.float32 square blocks"),
        ("ff", ((4, 3, 3), (8, 4)), r"w.weight_wrapper_in is torch.float32 \(8, 4\)"),
        ("ff", ((4, 3, 3), (3, 4, 4)), r"w.weight_wrapper_in .* \(3, 4, 4\), .* with k \* b = 8"),
        ("ff", ((2, 6, 3), (2, 4, 4)), r"w.weight_wrapper_out .* \(2, 6, 3\), .* with k \* b = 12"),
    ],
)
def test_a_wrapper_that_does_not_fit_is_refused(dtypes, found, message):
    kinds = {"h": torch.float16, "f": torch.float32}
    with pytest.raises(FormatError, match=message):
        check_header("w", [kinds[letter] for letter in dtypes], found, 12, 8, torch.float32)


def test_matrices_are_finite():
    wrapper = Wrapper(blocks(2, 3), blocks(2, 2))
    check_data("w", wrapper)
    wrapper.inner[1, 0, 1] = float("nan")
    with pytest.raises(FormatError, match=r"w.weight_wrapper_in holds nan at position \(1, 0, 1\)"):
        check_data("w", wrapper)
