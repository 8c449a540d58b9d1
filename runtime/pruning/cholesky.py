"""Cholesky factors, inverses and solutions in the memory of their argument: n x n matrices are the largest things.

Of a layer with 11008 inputs one takes 485 MB. A symmetric matrix is its own transpose, and the transpose of one
that is contiguous has the layout that LAPACK wants, so nothing is copied; results are those of the plain calls bit for
bit. torch does not promise that ``out`` may be the argument; tests/pruning/test_cholesky.py holds it to that.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factor_(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """The lower (or ``upper``) Cholesky factor of a symmetric ``matrix`` [n, n] of float32 or float64, in its place.

    None when it is not positive definite; what ``matrix`` holds has no meaning any more then.
    """
    columns = _by_columns(matrix)
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(columns, upper=upper, out=(columns, failed))
    return None if bool(failed) else factor


def inverse_(factor: Tensor) -> Tensor:
    """The inverse of the matrix whose lower Cholesky factor is ``factor`` [n, n], in its place."""
    columns = factor if factor.mT.is_contiguous() else factor.mT.contiguous().mT
    return torch.cholesky_inverse(columns, out=columns)


def solve_(factor: Tensor, right: Tensor) -> Tensor:
    """X [m, n] with X H = ``right`` [m, n], in its place, for H with the lower Cholesky factor ``factor`` [n, n].

    (``torch.cholesky_solve`` copies the factor in every call.)
    """
    right = right.contiguous()
    torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False, out=right)
    return torch.linalg.solve_triangular(factor, right, upper=False, left=False, out=right)


def _by_columns(matrix: Tensor) -> Tensor:
    """A symmetric matrix as one whose columns lie together."""
    return matrix if matrix.mT.is_contiguous() else matrix.contiguous().mT
