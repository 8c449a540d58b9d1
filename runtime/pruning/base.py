"""The contract of a pruner: a weight and what its inputs look like in, a weight and a mask out.

Every pruner keeps exactly the requested number of weights; of equal scores the lower index wins. (Thresholds with
``<=``, as in the scripts published with the papers, prune too much when scores tie.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.formats import Format
from sparse_rt.formats.selection import PIECE
from sparse_rt.formats.wrapper import Wrapper
from sparse_rt.pruning.statistics import ActivationStats
from sparse_rt.registry import Registry

# What a selection in a weight of many pieces takes at a time, counting digits included.
SELECTION_BYTES = 28 * PIECE

_PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    (
        "sparse_rt.pruning.none",
        "sparse_rt.pruning.magnitude",
        "sparse_rt.pruning.wanda",
        "sparse_rt.pruning.ria",
        "sparse_rt.pruning.sparsegpt",
        "sparse_rt.pruning.admm",
        "sparse_rt.pruning.alps",
        "sparse_rt.pruning.armor",
    ),
)
_REPAIRS: Registry[type[Repair]] = Registry(
    "repair", ("sparse_rt.pruning.dsnot", "sparse_rt.pruning.admm", "sparse_rt.pruning.alps")
)


def register_pruner(cls: type[Pruner]) -> type[Pruner]:
    """Class decorator: make a pruner known under ``cls.name``."""
    return _PRUNERS.register(cls.name, cls)


def register_repair(cls: type[Repair]) -> type[Repair]:
    """Class decorator: make a repair known under ``cls.name``."""
    return _REPAIRS.register(cls.name, cls)


def get_pruner(method: str) -> Pruner:
    """The pruner called ``method``, or "PRUNER+REPAIR+..."; ``UserError`` lists the known names otherwise."""
    first, *repairs = method.split("+")
    pruner = _PRUNERS.get(first)()
    if not repairs:
        return pruner
    if not pruner.prunes:
        raise UserError(
            f"method {method!r} repairs what {first} leaves, and {first} removes no weight; start with a pruner, for "
            f"example magnitude+{repairs[0]}"
        )
    if pruner.wraps:
        raise UserError(
            f"method {method!r} repairs what {first} leaves, and {first} leaves a product of three matrices, which no "
            f"repair knows; use {first} alone"
        )
    return Composed(pruner, [_REPAIRS.get(name)() for name in repairs])


def known_pruners() -> list[str]:
    return _PRUNERS.names()


def known_repairs() -> list[str]:
    return _REPAIRS.names()


class Pruned(NamedTuple):
    """What a pruner that ``wraps`` returns: the core [m, n], its mask, and the wrapper, all float32 but the mask."""

    weight: Tensor
    mask: Tensor
    wrapper: Wrapper | None = None


class Pruner(ABC):
    """One method. ``needs_gram`` asks the statistics for X^T X (n x n), ``needs_moments`` for sums and variances.

    ``keeps_columns`` says that every mask is one of ``fmt.mask_from_scores`` as it is, and so transposable where the
    format chooses such masks. ``scope`` says what keeps the requested share in an unstructured weight: every "row", or
    the "matrix" as a whole.
    """

    name: str
    prunes = True
    needs_calibration = False
    needs_gram = False
    needs_moments = False
    keeps_columns = True
    scope = "matrix"
    wraps = False  # whether it leaves the core of a product with a wrapper (formats/wrapper.py)

    @abstractmethod
    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor] | Pruned:
        """(weight [m, n], inputs seen by it) -> (weight [m, n], bool mask [m, n], True = kept).

        The returned weight is the given one, untouched, when the method only chooses a mask; float32 when it moves
        the kept weights. What it holds outside the mask has no meaning. ``sparsity`` is ignored by N:M patterns.
        A pruner that ``wraps`` returns ``Pruned``, with a wrapper.
        """

    def refuse_pattern(self, fmt: Format) -> str | None:
        """Why it cannot prune to this pattern, or None."""
        return None

    def blocks(self, m: int, n: int, fmt: Format) -> tuple[int, int] | None:
        """(rows, columns) of the blocks of the wrapper that it gives a weight (m, n), None without one."""
        return None

    def workspace(self, m: int, n: int) -> int:
        """Bytes that ``prune`` takes at its worst moment for a weight (m, n), besides that weight and the statistics.

        That of choosing a mask; methods that hold something else say so.
        """
        return choice_bytes(m, n)

    def calibrated(self, stats: ActivationStats | None) -> ActivationStats:
        return _calibrated(self.name, stats)


class Repair(ABC):
    """What is done to a pruned weight: other kept values, or other positions, and as many of them as before."""

    name: str
    needs_gram = False
    needs_moments = False
    keeps_columns = True  # as for a pruner

    @abstractmethod
    def repair(
        self, dense: Tensor, weight: Tensor, mask: Tensor, stats: ActivationStats, fmt: Format
    ) -> tuple[Tensor, Tensor]:
        """(weight before pruning, after it, mask; [m, n] each) -> (weight, mask), as ``Pruner.prune`` returns them."""

    def workspace(self, m: int, n: int) -> int:
        """Bytes that ``repair`` takes at its worst moment, besides its arguments; as ``Pruner.workspace``."""
        return choice_bytes(m, n)

    def calibrated(self, stats: ActivationStats | None) -> ActivationStats:
        return _calibrated(self.name, stats)


class Composed(Pruner):
    """A pruner, and repairs of what it leaves, in the order given."""

    needs_calibration = True

    def __init__(self, pruner: Pruner, repairs: list[Repair]):
        self.pruner, self.repairs = pruner, repairs
        self.name = "+".join(part.name for part in (pruner, *repairs))
        self.needs_gram = any(part.needs_gram for part in (pruner, *repairs))
        self.needs_moments = any(part.needs_moments for part in (pruner, *repairs))
        self.keeps_columns = all(part.keeps_columns for part in (pruner, *repairs))
        self.scope = pruner.scope

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        stats = self.calibrated(stats)
        new, mask = self.pruner.prune(weight, stats, fmt, sparsity)
        for repair in self.repairs:
            new, mask = repair.repair(weight, new, mask, stats, fmt)
        return new, mask

    def workspace(self, m: int, n: int) -> int:
        """Of the greediest part; while a repair works, what is repaired is there too: float32 and its mask."""
        repairs = max(repair.workspace(m, n) for repair in self.repairs)
        return max(self.pruner.workspace(m, n), 5 * m * n + repairs)


def _calibrated(name: str, stats: ActivationStats | None) -> ActivationStats:
    if stats is None or not stats.sequences:
        raise UserError(f"the pruner {name!r} needs calibration data; this weight has seen no input")
    return stats


def choice_bytes(m: int, n: int) -> int:
    """Bytes that choosing the mask of a weight (m, n) takes: float32 scores, the mask, and the selection in a piece."""
    return 5 * m * n + selection_bytes(m, n)


def selection_bytes(m: int, n: int) -> int:
    """Bytes that selecting among the scores of a weight (m, n) takes, besides scores and mask."""
    return min(14 * m * n, SELECTION_BYTES)


def unpruned_scores(weight: Tensor) -> Tensor:
    """|W| in float32: what magnitude ranks and what Wanda scales."""
    return weight.detach().to(torch.float32, copy=True).abs_()
