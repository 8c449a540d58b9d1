"""From options to the loss a Trainer adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import FinetuneOptions
from sparse_rt.data.training import IGNORED
from sparse_rt.errors import UserError
from sparse_rt.progress import Progress
from sparse_rt.training.distillation import cache, losses
from sparse_rt.training.distillation.teacher import Teacher, load_teacher, teacher_digest
from sparse_rt.training.rows import real_tokens

_WEIGHTS = {"kl": (1.0, 0.0), "squarehead": (0.0, 1.0), "both": (1.0, 1.0)}


@dataclass(frozen=True)
class Recipe:
    """loss = ce * (loss of the labels) + kl * KL + squarehead * SquareHead, and who teaches."""

    ce: float
    kl: float
    squarehead: float
    temperature: float
    top_k: int | None  # None: all logits of a live teacher
    teacher: str | None  # digest; None: a cache whose teacher is gone


class DenseTeacher:
    """The ``Distillation`` of a Trainer: the losses of ``recipe`` against ``teacher``.

    KL is summed over the tokens that the labels predict, as their own loss is, and divided by ``num_items`` of the
    whole optimizer step; SquareHead weighs each row by its share of them. So the sum over micro-batches is the loss of
    one large batch.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher):
        self.recipe, self.teacher = recipe, teacher
        self.forward_options: dict[str, Any] = {"output_hidden_states": True} if recipe.squarehead else {}

    def combine(self, loss: Tensor, inputs: dict[str, Any], outputs: Any, num_items: int | Tensor | None) -> Tensor:
        recipe, found = self.recipe, self.teacher(inputs)
        predicted = inputs["labels"][:, 1:] != IGNORED  # by the position before
        items = predicted.sum().clamp_min(1) if num_items is None else num_items
        with torch.autocast(loss.device.type, enabled=False):
            loss = recipe.ce * loss
            if recipe.kl:
                loss = loss + recipe.kl * found.kl(outputs.logits, predicted, recipe.temperature) / items
            if recipe.squarehead:
                weights = predicted.sum(1).to(loss.dtype) / items
                apart = losses.square_head(outputs.hidden_states[1:], found.hidden, real_tokens(inputs), weights)
                loss = loss + recipe.squarehead * apart
        return loss


def recipe_of(options: FinetuneOptions) -> Recipe | None:
    """None without a teacher; ``UserError`` for options that contradict each other."""
    names = ("distill", "kl_weight", "squarehead_weight", "ce_weight", "temperature", "teacher_top_k")
    if options.teacher is None and options.teacher_cache is None:
        fields = FinetuneOptions.model_fields
        given = next((name for name in names if getattr(options, name) != fields[name].default), None)
        if given:
            raise UserError(f"--{given.replace('_', '-')} needs a teacher; give --teacher MODEL or --teacher-cache DIR")
        return None
    # KL by itself suits every teacher and takes little room on disk; weights, when given, say what is wanted.
    weighed = options.kl_weight is not None or options.squarehead_weight is not None
    kl, squarehead = _WEIGHTS[options.distill] if options.distill else (0.0, 0.0) if weighed else _WEIGHTS["kl"]
    kl = kl if options.kl_weight is None else options.kl_weight
    squarehead = squarehead if options.squarehead_weight is None else options.squarehead_weight
    if not kl and not squarehead:
        raise UserError("a teacher with kl_weight 0 and squarehead_weight 0 teaches nothing; give one of them a weight")
    digest = teacher_digest(options.teacher) if options.teacher else None
    cached = options.teacher_cache is not None
    return Recipe(
        options.ce_weight, kl, squarehead, options.temperature, options.teacher_top_k if cached else None, digest
    )


def distillation(
    options: FinetuneOptions,
    recipe: Recipe,
    student: Checkpoint,
    dataset,
    collate: Callable,
    device: torch.device,
    progress: Progress,
) -> DenseTeacher:
    """The loss of ``recipe``; with a cache the teacher is in memory only while that is made.

    Raises ``UserError`` for a teacher of another kind than ``student``, and for a cache of something else.
    """
    hidden = recipe.squarehead > 0
    load = None
    if options.teacher is not None:
        load = lambda: load_teacher(options.teacher, student, hidden)  # noqa: E731
    if options.teacher_cache is None:
        progress.stage("loading the teacher")
        return DenseTeacher(recipe, load())

    def on_device():
        teacher = load()
        teacher.model.to(device)
        return teacher

    stored = {
        "top_k": min(recipe.top_k, student.config["vocab_size"]) if recipe.kl else 0,
        "temperature": recipe.temperature if recipe.kl else None,
        "hidden": hidden,
    }
    where = options.teacher_cache, load and on_device, recipe.teacher, dataset, stored, collate, progress
    return DenseTeacher(recipe, cache.open_cache(*where))


def described(recipe: Recipe | None) -> dict[str, Any]:
    """For the identity of a run and its result."""
    return {} if recipe is None else dataclasses.asdict(recipe)
