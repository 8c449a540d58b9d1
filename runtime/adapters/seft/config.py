"""Options of SEFT, and what they mean for one weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from sparse_rt.adapters.base import AdapterConfig
from sparse_rt.adapters.effective import WeightShape
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format

MODES = ("unstructured", "survivors", "nm_swap")
SCHEDULES = ("cosine", "linear")


@dataclass
class SEFTConfig(AdapterConfig):
    """Options of SEFT; interval 60 is the paper's for language modelling, it uses 10 for tasks."""

    rank: int = field(
        default=8, metadata={"help": "as many deltas as LoRA of this rank has parameters: rank * sum(m + n)"}
    )
    density: float | None = field(
        default=None, metadata={"help": "share of the elements of every weight that has a delta; overrides rank"}
    )
    mode: str | None = field(
        default=None,
        metadata={
            "help": "unstructured: the mask evolves; survivors: it stays; nm_swap: it evolves and stays N:M; "
            "default: unstructured for unstructured weights, survivors for N:M"
        },
    )
    interval: int = field(default=60, metadata={"help": "optimizer steps between two evolutions"})
    window: int = field(default=5, metadata={"help": "last steps of an interval whose gradients decide"})
    drop_rate: float = field(default=0.2, metadata={"help": "share of the deltas that moves at the first evolution"})
    drop_schedule: str = field(default="cosine", metadata={"help": "how drop_rate falls to 0: cosine or linear"})

    name: ClassVar[str] = "seft"

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank!r}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density must be above 0 and at most 1, got {self.density!r}")
        if self.mode is not None and self.mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 1 <= self.window <= self.interval:
            raise UserError(f"window must be from 1 to interval ({self.interval!r}), got {self.window!r}")
        if not 0 <= self.drop_rate <= 1:
            raise UserError(f"drop_rate must be from 0 to 1, got {self.drop_rate!r}")
        if self.drop_schedule not in SCHEDULES:
            raise UserError(f"drop_schedule must be one of {', '.join(SCHEDULES)}, got {self.drop_schedule!r}")

    def mode_of(self, pattern: str) -> str:
        """The mode of a weight of ``pattern``."""
        return self.mode or ("survivors" if get_format(pattern).group else "unstructured")

    def refuse(self, pattern: str) -> str | None:
        """Why a weight of ``pattern`` cannot be adapted in this mode, or None."""
        structured = get_format(pattern).group is not None
        if self.mode == "unstructured" and structured:
            return f"mode unstructured would break its pattern {pattern}; use survivors or nm_swap"
        if self.mode == "nm_swap" and not structured:
            return f"mode nm_swap swaps within the groups of N:M and its pattern is {pattern}; use unstructured"
        return None

    def moves_mask(self, pattern: str) -> bool:
        return self.mode_of(pattern) != "survivors"

    def deltas(self, shape: WeightShape) -> int:
        """How many deltas a weight has: a share of its elements, at least 1 and at most one a kept weight."""
        density = self.density
        if density is None:  # one layer alone; a model sets the density of all its layers together
            density = self.rank * (shape.m + shape.n) / (shape.m * shape.n)
        # The share may come from a division: 0.3 * 10 is 2.9999999999999996.
        return max(1, min(math.floor(density * shape.m * shape.n + 1e-6), shape.nnz))

    def drop_share(self, step: int, steps: int) -> float:
        """The share of deltas that moves at ``step`` of ``steps``."""
        done = min(step / max(steps, 1), 1.0)
        falling = (1 + math.cos(math.pi * done)) / 2 if self.drop_schedule == "cosine" else 1 - done
        return self.drop_rate * falling
