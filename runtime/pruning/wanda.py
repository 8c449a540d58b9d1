"""Wanda (Sun et al., arXiv 2306.11695): magnitude times the norm of the input that the weight multiplies."""

from __future__ import annotations

from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.pruning.base import Pruner, register_pruner, unpruned_scores
from sparse_rt.pruning.statistics import ActivationStats


@register_pruner
class Wanda(Pruner):
    """S_ij = |W_ij| sqrt(mean over sequences of ||X_:j||^2); ranked per output row, for N:M per group. No update."""

    name = "wanda"
    needs_calibration = True
    scope = "row"

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        scores = unpruned_scores(weight).mul_(self.calibrated(stats).input_norms().to(weight.device))
        return weight, fmt.mask_from_scores(scores, sparsity, self.scope)
