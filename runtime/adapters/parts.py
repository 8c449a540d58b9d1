"""What an adapter brings into a training run besides its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainingParts:
    """``callbacks`` join the Trainer's, ``optimizer`` takes the place of its own.

    Each of ``penalties`` is called once a micro-batch and gives a scalar that is added to the loss of an optimizer
    step, in nats a token; accumulation divides it, so that a step counts it once.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    optimizer: Optimizer | None = None
    penalties: tuple[Callable[[], Tensor], ...] = ()
