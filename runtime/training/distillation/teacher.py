"""The dense teacher in memory, and what makes a model one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint, file_digest, resolve_model
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.training.distillation import losses

# What a model is run with; everything else in a batch is for the losses.
INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Outputs:
    """Of a batch [B, T]: logits [B, T, V], or the likeliest tokens (``losses.top``); hidden states [B, T, H] a block.

    Hidden states are those that transformers gives: the last one has passed the final norm.
    """

    logits: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    hidden: Sequence[Tensor] | None = None

    def kl(self, student: Tensor, predicted: Tensor, temperature: float) -> Tensor:
        """Sum over the positions ``predicted`` (bool [B, T - 1]) of the divergence to the student's logits."""
        student = student[:, :-1][predicted]
        if self.top is None:
            return losses.kl(student, self.logits[:, :-1][predicted], temperature)
        ids, log_p = (part[:, :-1][predicted] for part in self.top)
        return losses.kl_of_top(student, ids, log_p, temperature)


class Teacher(Protocol):
    def __call__(self, inputs: dict[str, Any]) -> Outputs: ...


class LiveTeacher:
    """A model that runs beside the student: in eval mode, without gradients, in its own dtype."""

    def __init__(self, model, hidden: bool):
        self.model, self.hidden = model.eval().requires_grad_(False), hidden

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Outputs:
        ids = inputs["input_ids"]
        if self.model.device != ids.device:
            self.model.to(ids.device)
        given = {name: inputs[name] for name in INPUTS if name in inputs}
        with torch.autocast(ids.device.type, enabled=False):
            found = self.model(**given, use_cache=False, output_hidden_states=self.hidden)
        return Outputs(found.logits, None, found.hidden_states[1:] if self.hidden else None)


def load_teacher(name: str, student: Checkpoint, hidden: bool) -> LiveTeacher:
    """The model ``name`` (folder or hub id); ``UserError`` when it cannot teach ``student``."""
    model = load(name)
    refuse_other_kind(name, model.config, student, hidden)
    return LiveTeacher(model, hidden)


def refuse_other_kind(name: str, config, student: Checkpoint, hidden: bool) -> None:
    """``UserError`` unless teacher and student have the same tokens and, for ``hidden``, blocks of the same size."""
    names = ["vocab_size", *(["hidden_size", "num_hidden_layers"] if hidden else [])]
    for key in names:
        theirs, ours = getattr(config, key, None), student.config.get(key)
        if theirs != ours:
            why = "the same tokenizer" if key == "vocab_size" else "hidden states of the same number and size"
            instead = "" if key == "vocab_size" else ", or leave SquareHead out (--distill kl)"
            raise UserError(
                f"the teacher {name} has {key} {theirs}, the student {ours}; a teacher needs {why}: give the dense "
                f"model that the student was made from{instead}"
            )
    try:
        tokenizers = [load_tokenizer(folder).get_vocab() for folder in (name, student.folder)]
    except (OSError, ValueError, UserError):
        return  # a teacher without a tokenizer: its vocabulary has the right size, more cannot be known
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"the teacher {name} has another tokenizer than the student: the same number means another token to it; "
            "give the dense model that the student was made from"
        )


def teacher_digest(name: str) -> str:
    """sha256 over config.json and all weight files."""
    folder = resolve_model(name)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(f"{file.name} {file_digest(file)}\n" for file in files).encode()).hexdigest()
