"""``none``: the weight is pruned already; its zeros are the mask, its values stay bit for bit."""

from __future__ import annotations

from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.pruning.base import Pruner, register_pruner
from sparse_rt.pruning.statistics import ActivationStats


@register_pruner
class AlreadyPruned(Pruner):
    name = "none"
    prunes = False

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        """Raises ``FormatError`` with the position where ``weight`` does not obey the pattern."""
        return weight, fmt.mask_of(weight)
