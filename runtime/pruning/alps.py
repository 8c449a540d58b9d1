"""ALPS (Meng et al., arXiv 2406.07831): choose a mask with ADMM, then solve for the kept weights.

Schedule and constants are those of the published code, where H + rho I is inverted with an eigendecomposition of H,
computed once in float64. Here it is factorised anew for every rho, which gives the same iterates. On one CPU core with
n = 2048 an eigendecomposition takes 2.2 s (1.0 s in float32), a Cholesky factor in float32 0.06 s, and layers need
about eleven of them; float64 throughout, in the tests, chooses the same masks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.pruning.base import Pruner, Repair, register_pruner, register_repair, selection_bytes
from sparse_rt.pruning.least_squares import LeastSquares
from sparse_rt.pruning.statistics import ActivationStats

RIDGE = 0.01
# The penalty at the start, and where it ends: the published code has no lower bound, and would divide it until it is
# zero when the best mask is that of the start (inputs without correlation).
RHO, RHO_MIN, RHO_MAX = 0.1, 1e-3, 1e6
MAX_ITERATIONS, INTERVAL, PATIENCE = 300, 3, 30
SETTLED = 3e-4  # the choice ends when fewer of the kept positions change, as a share
POLISH = 10  # iterations of conjugate gradients


@register_pruner
class ALPS(Pruner):
    """ADMM with a growing penalty rho until the mask settles, then conjugate gradients on that mask.

    An unstructured weight is ranked as a whole, N:M group by group. Time is that of about 50 products [m, n] [n, n].
    """

    name = "alps"
    needs_calibration = True
    needs_gram = True

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        problem = LeastSquares(weight, self.calibrated(stats), ridge=RIDGE)

        def select(scaled: Tensor) -> Tensor:
            # Squares, because what ADMM asks for is the nearest weight that obeys the pattern. (To rank single weights
            # absolute values would do, for masks chosen by sums, as transposable ones, they are another question.)
            return fmt.mask_from_scores(scaled.square(), sparsity, self.scope)

        solution = choose(problem, select)
        mask = select(solution)
        return problem.restore(problem.polish(solution, mask, POLISH)), mask

    def workspace(self, m: int, n: int) -> int:
        """H, its factor, T, B, C, scores, two masks and the selection; or ``ConjugateGradients``'."""
        choosing = 18 * m * n + selection_bytes(m, n) + 8 * n * n
        return max(choosing, polishing_bytes(m, n))


@register_repair
class ConjugateGradients(Repair):
    """The last step of ALPS alone: the kept weights, as they are left by a pruner, moved towards the least squares."""

    name = "pcg"
    needs_gram = True

    def repair(
        self, dense: Tensor, weight: Tensor, mask: Tensor, stats: ActivationStats, fmt: Format
    ) -> tuple[Tensor, Tensor]:
        problem = LeastSquares(dense, self.calibrated(stats), ridge=RIDGE)
        return problem.restore(problem.polish(problem.scale(weight), mask, POLISH)), mask

    def workspace(self, m: int, n: int) -> int:
        return polishing_bytes(m, n)


def polishing_bytes(m: int, n: int) -> int:
    """H, T and five of their size in conjugate gradients: start, solution, residual, direction, its product."""
    return 28 * m * n + 4 * n * n


def choose(problem: LeastSquares, select: Callable[[Tensor], Tensor]) -> Tensor:
    """The free solution [m, n] (scaled) of ADMM once the mask has settled; ``select`` keeps the largest of [m, n]."""
    rho, grown = RHO, False
    state = problem.scale(problem.weight)
    mask = previous = select(state)
    kept = max(int(mask.sum()), 1)
    state.masked_fill_(~mask, 0)
    factor = problem.factor(rho)
    for iteration in range(1, MAX_ITERATIONS + 1):
        solution = problem.admm_step(factor, rho, state, mask)
        mask = select(state)
        if iteration % INTERVAL:
            continue
        changed = int((mask ^ previous).sum()) / kept
        if (iteration > PATIENCE and changed < SETTLED) or (grown and not changed):
            break
        previous = mask
        grown = grown or changed > 0.005
        before, rho = rho, next_rho(rho, changed, grown)
        if rho < RHO_MIN:
            break
        if changed and not grown:  # next to nothing may change, rho is too large: from the start with a smaller one
            state = problem.scale(problem.weight)
            mask = select(state)
            state.masked_fill_(~mask, 0)
        else:  # the dual is rho times the scaled one
            state = torch.where(mask, state, state * (before / rho))
        factor = None  # not two at a time
        factor = problem.factor(rho)
    return solution


def next_rho(rho: float, changed: float, grown: bool) -> float:
    """The more positions change (as a share of the kept ones), the faster it grows; before any has: less of it."""
    if not grown:
        return rho / 5
    return min(rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), RHO_MAX)
