"""Magnitude: keep the largest |W|, over the whole matrix (unstructured) or in every group (N:M)."""

from __future__ import annotations

from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.pruning.base import Pruner, register_pruner, unpruned_scores
from sparse_rt.pruning.statistics import ActivationStats


@register_pruner
class Magnitude(Pruner):
    name = "magnitude"

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        return weight, fmt.mask_from_scores(unpruned_scores(weight), sparsity)
