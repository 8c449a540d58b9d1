"""What a run trains and evaluates on, made from its options."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import FinetuneOptions
from sparse_rt.data import training_dataset, training_split
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load_tokenizer
from sparse_rt.progress import Progress


@dataclass(frozen=True)
class TrainingData:
    """``datasets`` to train and to evaluate on (None: no evaluation), and how their rows were made."""

    train: Any
    evaluation: Any | None
    pad_token_id: int
    max_seq_len: int

    @property
    def digest(self) -> str:
        """sha256 of the rows whatever their order, which belongs to the seed."""
        digests = []
        for part in (self.train, self.evaluation):
            rows = [] if part is None else part.with_format("numpy", columns=part.column_names)
            found = sorted(hashlib.sha256(b"".join(row[name].tobytes() for name in row)).digest() for row in rows)
            digests.append(hashlib.sha256(b"".join(found)).digest())
        return hashlib.sha256(b"".join(digests)).hexdigest()


def training_data(options: FinetuneOptions, checkpoint: Checkpoint, progress: Progress) -> TrainingData:
    """Rows no longer than the model has positions; ``UserError`` for a model without a tokenizer, or wrong data."""
    if options.eval_dataset is not None and options.eval_fraction:
        raise UserError("give either eval_dataset or eval_fraction: the rows to evaluate on come from one place")
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{options.model} has no tokenizer that loads ({reason}); copy its tokenizer files") from error
    length = options.max_seq_len
    positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < length:
        progress.note(f"sequences have {positions} tokens: the model has no more positions")
        length = positions
    padding = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    pad_token_id = next(token for token in padding if token is not None)
    how = dict(completion_only=options.completion_only, packing=options.packing, note=progress.note)
    where = options.dataset, tokenizer, length, options.seed
    train, evaluation = training_split(*where, eval_fraction=options.eval_fraction, **how)
    if options.eval_dataset is not None:
        evaluation = training_dataset(options.eval_dataset, *where[1:], **how)
    return TrainingData(train, evaluation, pad_token_id, length)


@torch.no_grad()
def refuse_leaking(model) -> None:
    """``UserError`` when a packed text would see the one before it: not every architecture heeds position_ids.

    The second of two packed texts must give the same logits whatever the first one says; compared with what the first
    one does when positions run on, because experts and some kernels round differently with other neighbours.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a process that receives its weights later; the first one has looked
    length = 8
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (3, length), generator=generator)
    rows = torch.stack([torch.cat([tokens[0], tokens[2]]), torch.cat([tokens[1], tokens[2]])]).to(model.device)
    apart = torch.arange(length, device=model.device).repeat(2)[None]

    def difference(positions) -> float:
        # Without a cache, as in training: with one, transformers does not look for packed texts.
        one, other = (model(row[None], position_ids=positions, use_cache=False).logits[0, length:] for row in rows)
        return float((one.double() - other.double()).norm())

    mode = model.training
    model.eval()
    leak, seen = difference(apart), difference(torch.arange(2 * length, device=model.device)[None])
    model.train(mode)
    if leak > 0.02 * seen:
        raise UserError(
            f"packing does not work with {model.config.model_type} models: a text would see the one before it; leave "
            "out packing"
        )
