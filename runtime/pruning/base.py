"""The contract of a pruner: a weight and what its inputs look like in, a weight and a mask out.

Every pruner keeps exactly the requested number of weights; of equal scores the lower index wins. (Thresholds with
``<=``, as in the scripts published with the papers, prune too much when scores tie.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.formats import Format
from sparse_rt.pruning.statistics import ActivationStats
from sparse_rt.registry import Registry

_PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    (
        "sparse_rt.pruning.none",
        "sparse_rt.pruning.magnitude",
        "sparse_rt.pruning.wanda",
        "sparse_rt.pruning.sparsegpt",
    ),
)


def register_pruner(cls: type[Pruner]) -> type[Pruner]:
    """Class decorator: make a pruner known under ``cls.name``."""
    return _PRUNERS.register(cls.name, cls)


def get_pruner(name: str) -> Pruner:
    """The pruner called ``name``; ``UserError`` lists the known ones otherwise."""
    return _PRUNERS.get(name)()


def known_pruners() -> list[str]:
    return _PRUNERS.names()


class Pruner(ABC):
    """One method. ``needs_gram`` asks the statistics for X^T X (n x n) besides the cheap figures."""

    name: str
    needs_calibration = False
    needs_gram = False

    @abstractmethod
    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        """(weight [m, n], inputs seen by it) -> (weight [m, n], bool mask [m, n], True = kept).

        The returned weight is the given one, untouched, when the method only chooses a mask; float32 when it moves
        the kept weights. What it holds outside the mask has no meaning. ``sparsity`` is ignored by N:M patterns.
        """

    def calibrated(self, stats: ActivationStats | None) -> ActivationStats:
        if stats is None or not stats.sequences:
            raise UserError(f"the pruner {self.name!r} needs calibration data; this weight has seen no input")
        return stats


def unpruned_scores(weight: Tensor) -> Tensor:
    """|W| in float32: what magnitude ranks and what Wanda scales."""
    return weight.detach().to(torch.float32).abs()
