"""The problem behind ALPS and the ADMM update: a pruned layer shall give what the dense one gave.

    minimise  tr (W' - W) H (W' - W)^T   over W' [m, n] that is zero where its mask says so,   H = X^T X + ridge

The inputs are scaled first, by nu_j = sqrt(H_jj): columns of W are multiplied by nu, and H, divided by nu nu^T, has a
diagonal of ones. |W_ij| nu_j, by which weights are ranked at the start, is Wanda's score.

ADMM alternates between a free solution B and one that obeys the mask, which a penalty rho draws together. One state
is enough for it: C = B + U, with U the scaled dual. The solution with zeros is C at the kept positions, U is C at the
others, and one iteration is

    B = (T + rho (C where kept, else -C)) (H + rho I)^-1,   T = W H
    C = B + (0 where kept, else C)

which the papers write with three variables (arXiv 2401.02938, Algorithm 1; arXiv 2406.07831, equation 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError
from sparse_rt.formats import all_finite
from sparse_rt.pruning import cholesky
from sparse_rt.pruning.statistics import ActivationStats


class LeastSquares:
    """``weight`` [m, n] of any float dtype, and the second moments of what it multiplies; all else is float32.

    The ridge on H is ``ridge`` times the mean of its diagonal before scaling; ``scaled_ridge`` is added after it.

    Inputs that were zero all the time say nothing about the weights that they meet: those rank last, and keep the value
    they have in ``weight`` where they stay.

    ``gram`` [n, n] is the scaled H, ``target`` [m, n] is T: 4 n^2 + 4 m n bytes.
    """

    def __init__(self, weight: Tensor, stats: ActivationStats, ridge: float = 0.0, scaled_ridge: float = 0.0):
        self.weight = weight.detach()
        self.gram = stats.gram.to(weight.device, copy=True)
        diagonal = self.gram.diagonal()
        self.dead = diagonal == 0
        diagonal += ridge * diagonal.mean()
        self.norms = torch.where(self.dead, 1.0, diagonal.sqrt())
        self.gram.div_(self.norms).div_(self.norms[:, None])
        diagonal.fill_(1.0 + scaled_ridge)
        self.target = self.scale(self.weight) @ self.gram

    def scale(self, weight: Tensor) -> Tensor:
        """A weight [m, n] for scaled inputs, float32; zero where the input is dead."""
        return (weight * self.norms).masked_fill_(self.dead, 0)

    def restore(self, scaled: Tensor) -> Tensor:
        """The inverse of ``scale``, as a new tensor; ``SparseRTError`` when the result is not finite."""
        weight = scaled / self.norms
        weight[:, self.dead] = self.weight[:, self.dead].to(weight)
        if not all_finite(weight):
            raise SparseRTError("the weight update gave weights that are not finite; use --method wanda for this model")
        return weight

    def factor(self, rho: float) -> Tensor:
        """Lower Cholesky factor of H + rho I, [n, n]; ``SparseRTError`` when that is not positive definite."""
        damped = self.gram.clone()
        damped.diagonal().add_(rho)
        lower = cholesky.factor_(damped)
        if lower is None:
            raise SparseRTError(
                "the second moments of the inputs are not positive definite; use more calibration data (--num-samples) "
                "or --method wanda"
            )
        return lower

    def admm_step(self, factor: Tensor, rho: float, state: Tensor, mask: Tensor) -> Tensor:
        """The free solution B [m, n]; C, ``state`` [m, n], is overwritten by the next one. ``factor`` is of ``rho``."""
        right = state.neg()
        torch.where(mask, state, right, out=right).mul_(rho).add_(self.target)
        solution = cholesky.solve_(factor, right)
        state.masked_fill_(mask, 0).add_(solution)
        return solution

    def polish(self, start: Tensor, mask: Tensor, iterations: int) -> Tensor:
        """Conjugate gradients from the kept positions of ``start`` [m, n] (scaled), every row a system of its own.

        They are preconditioned by the diagonal of H (2406.07831, Algorithm 2): scaling does that.
        """
        solution = torch.where(mask, start, 0)
        residual = torch.where(mask, self.target - solution @ self.gram, 0)
        direction = residual.clone()
        squared = residual.square().sum(1)
        for _ in range(iterations):
            change = direction @ self.gram
            step = _ratio(squared, (direction * change).sum(1))
            solution.addcmul_(step, direction)
            residual.addcmul_(step, change.mul_(mask), value=-1)
            before, squared = squared, residual.square().sum(1)
            direction.mul_(_ratio(squared, before)).add_(residual)
        return solution


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[m] / [m] as a column; 0 where a row is solved and nothing is left to divide by."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)[:, None]
