"""One training run: the adapter attached to the compressed model, transformers' Trainer, and what came of it."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sparse_rt.adapters.base import AdapterConfig
from sparse_rt.data.training import IGNORED
from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.progress import Progress
from sparse_rt.training import sharding
from sparse_rt.training.checkpoints import MarkComplete
from sparse_rt.training.dataset import TrainingData
from sparse_rt.training.previous import start_from
from sparse_rt.training.saved import SavedAdapter
from sparse_rt.training.trainer import Distillation, SparseTrainer


def attach(
    model, config: AdapterConfig, base: str, revision: str | None, digest: str, previous: SavedAdapter | None = None
):
    """The ``PeftModel`` of ``model``; the adapter remembers the base by name, revision and digest.

    It starts as the identity, or with the parameters of ``previous``.
    """
    adapted = get_peft_model(model, config)
    if previous is not None:
        start_from(adapted, previous)
    config = adapted.peft_config["default"]
    # PEFT notes the folder the weights were read from, which for a hub model is this machine's cache.
    config.base_model_name_or_path, config.revision, config.base_digest = base, revision, digest
    model.config.use_cache = False
    return adapted


class Collator:
    """input_ids, labels and attention_mask or position_ids of a batch, int64 [batch, length]: padded on the right.

    Packed rows have no mask: attention is cut where positions start again, and every token of their padding, at the
    position 0, is a text of its own.
    """

    def __init__(self, pad_token_id: int):
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
            for name, value in self.padding.items()
            if name in rows[0]
        }


class Follow(TrainerCallback):
    """Shows the steps and stops a run whose loss is no number any more."""

    def __init__(self, progress: Progress):
        self.progress, self.steps = progress, iter(())

    def on_train_begin(self, args, state, control, **kwargs):
        left = range(state.global_step, state.max_steps)
        self.steps = iter(self.progress.track(left, "training", len(left)))
        next(self.steps, None)

    def on_step_end(self, args, state, control, **kwargs):
        next(self.steps, None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise SparseRTError(
                f"the loss is {loss} at step {state.global_step}; lower learning_rate "
                f"(it is {args.learning_rate}) or raise warmup_steps, and start again"
            )


@dataclass(frozen=True)
class Trained:
    """A finished run. Losses are (step, loss) of the whole run, also before a resume; times are of this process."""

    trainer: Trainer
    losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    steps: int
    tokens: int
    seconds: float

    @property
    def first_loss(self) -> float:
        return _mean(self.losses[: self._tenth])

    @property
    def last_loss(self) -> float:
        return _mean(self.losses[-self._tenth :])

    def evaluation(self) -> dict[str, Any]:
        """The evaluation losses as a result shows them; nothing where there was no evaluation."""
        if not self.eval_losses:
            return {}
        first, last = self.eval_losses[0][1], self.eval_losses[-1][1]
        return {"eval_loss_before": first, "eval_loss": last, "eval_losses": self.eval_losses}

    @property
    def _tenth(self) -> int:
        # Not the first and the last entry: single batches differ by more than a short training gains.
        return max(1, len(self.losses) // 10)


def _mean(losses: list[tuple[int, float]]) -> float:
    return sum(loss for _, loss in losses) / len(losses)


def train(
    model,
    data: TrainingData,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    progress,
    distillation: Distillation | None = None,
) -> Trained:
    """Train from the beginning, or go on from ``checkpoint``, to the end of the schedule.

    Raises ``UserError`` for options the Trainer refuses, ``SparseRTError`` when the loss or the adapter stops being
    finite; checkpoints stay where they are.
    """
    callbacks = [MarkComplete(), Follow(progress)]
    try:
        trainer = SparseTrainer(
            model, arguments, Collator(data.pad_token_id), data.train, callbacks, distillation, data.evaluation
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"training options: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        raise UserError(f"training option report_to: {error}") from error  # a reporter whose package is missing
    for callback in (PrinterCallback, ProgressCallback):  # both write to standard output
        trainer.remove_callback(callback)
    before = _tokens_before(checkpoint)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    _refuse_broken(trainer)
    evaluated = [step for step, _ in _logged(trainer, "eval_loss")]
    if data.evaluation is not None and evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()
    losses = _logged(trainer, "loss") or [(trainer.state.global_step, trainer.state.log_history[-1]["train_loss"])]
    tokens = trainer.state.num_input_tokens_seen - before
    return Trained(trainer, losses, _logged(trainer, "eval_loss"), trainer.state.global_step, tokens, seconds)


def _logged(trainer: Trainer, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def trainable_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tokens_before(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).num_input_tokens_seen


def _refuse_broken(trainer: Trainer) -> None:
    parameters = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    broken = next((name for name, parameter in parameters if not sharding.all_finite(parameter)), None)
    # One process may see it and another not: all of them stop, or the rest would wait for ever.
    found = trainer.accelerator.reduce(torch.tensor(int(broken is not None), device=trainer.args.device))
    if found:
        name = broken or "the part of another process"
        raise SparseRTError(f"training left NaN or Inf in {name}; lower learning_rate and start again")


def peak_memory() -> dict[str, Any]:
    """Largest resident size of this process so far, and of the GPU's memory when there is one."""
    found = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found
