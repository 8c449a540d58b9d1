"""The ADMM weight update (Boza, arXiv 2401.02938): of any mask, or while a mask is chosen little by little.

One Cholesky factorisation a layer, and twenty iterations with rho = 1.
"""

from __future__ import annotations

from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.formats.base import check_sparsity, num_kept
from sparse_rt.formats.selection import keep_highest
from sparse_rt.pruning.base import Pruner, Repair, register_pruner, register_repair, selection_bytes
from sparse_rt.pruning.least_squares import LeastSquares
from sparse_rt.pruning.statistics import ActivationStats

SCALED_RIDGE, RHO = 0.1, 1.0
ITERATIONS, CHOOSING = 20, 15


@register_repair
class ADMMUpdate(Repair):
    """Kept weights for a mask that stays (Algorithm 1). They start from the dense ones, whatever the pruner made."""

    name = "admm"
    needs_gram = True

    def repair(
        self, dense: Tensor, weight: Tensor, mask: Tensor, stats: ActivationStats, fmt: Format
    ) -> tuple[Tensor, Tensor]:
        problem = LeastSquares(dense, self.calibrated(stats), scaled_ridge=SCALED_RIDGE)
        factor, state = problem.factor(RHO), problem.scale(dense)
        for _ in range(ITERATIONS):
            problem.admm_step(factor, RHO, state, mask)
        return problem.restore(state), mask

    def workspace(self, m: int, n: int) -> int:
        """H, its factor, T, C and the right side, which becomes the solution."""
        return 12 * m * n + 8 * n * n


@register_pruner
class ADMM(Pruner):
    """The same with a mask chosen anew in the first fifteen iterations, of ever fewer weights (Algorithm 2).

    An unstructured weight is ranked as a whole. (The published code does so too, but without the gradual schedule,
    which it follows for rankings by row and for N:M only; here it is followed always, as in the paper.)
    """

    name = "admm"
    needs_calibration = True
    needs_gram = True

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        problem = LeastSquares(weight, self.calibrated(stats), scaled_ridge=SCALED_RIDGE)
        factor, state = problem.factor(RHO), problem.scale(weight)
        for iteration in range(1, ITERATIONS + 1):
            if iteration <= CHOOSING:
                mask = gradual_mask(state.square(), fmt, sparsity, iteration / CHOOSING)
            problem.admm_step(factor, RHO, state, mask)
        return problem.restore(state), mask

    def workspace(self, m: int, n: int) -> int:
        """H, its factor, T and C, and two sets of scores, two masks and the selection."""
        return 18 * m * n + selection_bytes(m, n) + 8 * n * n


def gradual_mask(scores: Tensor, fmt: Format, sparsity: float | None, progress: float) -> Tensor:
    """The mask [m, n] at ``progress`` 0..1, with s (1 - (1 - progress)^3) of the weights removed.

    N:M spares the N best of every group from the beginning, and removes the lowest of all others in the matrix.
    """
    legal = fmt.mask_from_scores(scores, sparsity) if fmt.group or progress == 1 else None
    if progress == 1:
        return legal
    final = check_sparsity(sparsity) if fmt.default_sparsity is None else fmt.default_sparsity
    if fmt.group:
        scores = scores.masked_fill(legal, float("inf"))
    keep = num_kept(scores.numel(), final * (1 - (1 - progress) ** 3))
    return keep_highest(scores.flatten(), keep).view(scores.shape)
