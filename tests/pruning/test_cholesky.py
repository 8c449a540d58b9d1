"""Factors, inverses and solutions in place: the numbers of the plain calls, in the memory of their argument."""

import pytest
import torch

from sparse_rt.pruning import cholesky

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def definite(n, dtype, seed=0):
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = x.T @ x + torch.eye(n)
    return (matrix + matrix.T).to(dtype)  # symmetric to the last bit


@pytest.mark.parametrize("n", [1, 2, 7, 64, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_equal_to_the_plain_calls_and_nowhere_else(n, dtype, by_columns, device):
    matrix = definite(n, dtype).to(device)
    lower = torch.linalg.cholesky(matrix)
    inverse = torch.cholesky_inverse(lower)
    upper = torch.linalg.cholesky(inverse, upper=True)
    given = matrix.clone().T if by_columns else matrix.clone()
    place = given.data_ptr()
    found = cholesky.factor_(given)
    assert torch.equal(found, lower) and found.data_ptr() == place
    found = cholesky.inverse_(found)
    assert torch.equal(found, inverse) and found.data_ptr() == place
    found = cholesky.factor_(found, upper=True)
    assert torch.equal(found, upper) and found.data_ptr() == place
    right = torch.randn(5, n, dtype=dtype).to(device)
    expected = torch.linalg.solve(matrix.double(), right.double().T).T
    place = right.data_ptr()
    found = cholesky.solve_(lower, right)
    assert found.data_ptr() == place
    assert torch.allclose(found.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-5)


def test_a_matrix_that_is_not_positive_definite():
    matrix = definite(20, torch.float32)
    matrix[13, 13] = -1
    assert cholesky.factor_(matrix) is None


def test_views_and_transposed_right_sides():
    """A part of a larger matrix cannot be worked on in place; the result is right all the same."""
    whole = torch.zeros(40, 40)
    whole[3:23, 3:23] = definite(20, torch.float32)
    lower = torch.linalg.cholesky(whole[3:23, 3:23])
    assert torch.equal(cholesky.factor_(whole[3:23, 3:23]), lower)
    right = torch.randn(20, 6)
    assert torch.equal(cholesky.solve_(lower, right.T), cholesky.solve_(lower, right.T.contiguous()))
    assert torch.equal(cholesky.inverse_(lower.contiguous()), torch.cholesky_inverse(lower))
