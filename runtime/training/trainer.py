"""transformers' Trainer with what sparse training adds: an adapter's penalties, a dense teacher, packed rows, FSDP2."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Trainer

from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.data.training import IGNORED
from sparse_rt.training import sharding
from sparse_rt.training.rows import real_tokens


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
        if self.distillation is not None and model.training:
            inputs = {**inputs, **self.distillation.forward_options}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if self.distillation is not None:
                items = num_items_in_batch
                if items is not None and self.args.average_tokens_across_devices:
                    # The Trainer counts the tokens of all processes and multiplies the loss by their number, because
                    # the gradients are averaged: this is the number to divide a sum of this process by.
                    items = items / self.accelerator.num_processes
                loss = self.distillation.combine(loss, inputs, outputs, items)
            for penalty in self.parts.penalties:
                # With num_items_in_batch the Trainer sums over micro-batches and divides nothing afterwards.
                share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                loss = loss + penalty() / share
        return (loss, outputs) if return_outputs else loss


class SparseTrainer(ExtraLoss, Trainer):
    """``Trainer`` for an adapted model; the adapter's own callbacks and optimizer are already in place.

    The evaluation loss is the mean over all predicted tokens, however they are batched, padded or packed.
    """

    def __init__(
        self,
        model,
        arguments,
        collator,
        dataset,
        callbacks=(),
        distillation: Distillation | None = None,
        eval_dataset=None,
    ):
        self.parts = model.base_model.training_parts(arguments)
        self.distillation = distillation
        self._evaluated: list[Tensor] = []
        options = arguments.gradient_checkpointing_kwargs or {}
        if arguments.gradient_checkpointing and options.get("use_reentrant"):
            # That kind of checkpoint has a gradient only where its input has one; the embeddings are frozen.
            model.enable_input_require_grads()
        super().__init__(
            model,
            arguments,
            collator,
            dataset,
            eval_dataset=eval_dataset,
            callbacks=[*callbacks, *self.parts.callbacks],
            optimizers=(self.parts.optimizer, None),
        )
        sharding.prepare(self, model.base_model)

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        sharding.save_adapter(self, output_dir or self.args.output_dir)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)
        tokens = (labels != IGNORED).sum(1)
        # Without the rows that fill up the last batch of the processes.
        found = self.accelerator.gather_for_metrics((losses.double(), tokens))
        self._evaluated.append(torch.stack([part.double().sum() for part in found]))
        return losses.sum() / tokens.sum(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **options):
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._evaluated:
            loss, tokens = torch.stack(self._evaluated).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def _track_num_input_tokens(self, inputs):
        if "input_ids" in inputs:
            inputs = {**inputs, "attention_mask": real_tokens(inputs)}
        super()._track_num_input_tokens(inputs)
