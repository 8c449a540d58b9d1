"""transformers' Trainer with what sparse training adds to the loss: an adapter's penalties, and a dense teacher."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import Trainer

from sparse_rt.adapters.parts import TrainingParts


class Distillation(Protocol):
    """A loss against a dense teacher."""

    # Options of the student's forward pass, such as output_hidden_states.
    forward_options: dict[str, Any]

    def combine(self, loss: Tensor, inputs: dict[str, Any], outputs: Any, num_items: int | Tensor | None) -> Tensor:
        """The loss to train with, given the loss of the labels.

        ``num_items``: label tokens of the whole optimizer step, which sums over tokens are divided by; None: means over
        this micro-batch.
        """


class ExtraLoss:
    """Mix-in for a Trainer (transformers', or a class derived from it such as TRL's SFTTrainer)."""

    parts = TrainingParts()
    distillation: Distillation | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.distillation is not None:
            inputs = {**inputs, **self.distillation.forward_options}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if self.distillation is not None:
                loss = self.distillation.combine(loss, inputs, outputs, num_items_in_batch)
            for penalty in self.parts.penalties:
                # With num_items_in_batch the Trainer sums over micro-batches and divides nothing afterwards.
                share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                loss = loss + penalty() / share
        return (loss, outputs) if return_outputs else loss


class SparseTrainer(ExtraLoss, Trainer):
    """``Trainer`` for an adapted model; the adapter's own callbacks and optimizer are already in place."""

    def __init__(self, model, arguments, collator, dataset, callbacks=(), distillation: Distillation | None = None):
        self.parts = model.base_model.training_parts(arguments)
        self.distillation = distillation
        super().__init__(
            model,
            arguments,
            collator,
            dataset,
            callbacks=[*callbacks, *self.parts.callbacks],
            optimizers=(self.parts.optimizer, None),
        )
