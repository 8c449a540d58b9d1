"""Documents as strings, and as windows of one stream of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt import assets
from sparse_rt.data.shapes import documents
from sparse_rt.errors import UserError


def read_texts(source: str | Path | None, tokenizer=None) -> list[str]:
    """Every text of ``source`` (None: the shipped calibration text); conversations go through the chat template.

    Empty rows are left out. Raises ``UserError`` for a missing or unreadable source, unknown columns, or conversations
    without a tokenizer that has a chat template.
    """
    source = assets.calibration_text() if source is None else source
    texts = [document.text for document in documents(source, tokenizer)]
    if not texts:
        raise UserError(f"data set {source} holds no text; give a source with at least one non-empty row")
    return texts


def token_windows(texts: Iterable[str], tokenizer, length: int, count: int | None = None, seed: int = 0) -> Tensor:
    """Windows of ``length`` tokens out of the concatenated texts: int64 [k, length].

    Every text is tokenized with the special tokens its tokenizer adds by itself, and texts are separated by the end
    token. Without ``count`` all windows that do not overlap, in order; with it ``count`` different random starts (all
    starts when there are fewer), chosen by ``seed`` as in the calibration of SparseGPT and Wanda.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        if stream:
            stream += end
        stream += tokenize(tokenizer, text)["input_ids"]
    if len(stream) < length:
        raise UserError(
            f"the text has {len(stream)} tokens, one window needs {length}; give a longer text or a lower max_seq_len"
        )
    tokens = torch.tensor(stream, dtype=torch.long)
    if count is None:
        return tokens[: len(stream) // length * length].view(-1, length)
    starts = len(stream) - length + 1
    chosen = random.Random(seed).sample(range(starts), min(count, starts))
    return torch.stack([tokens[start : start + length] for start in chosen])


def tokenize(tokenizer, text: str, **options):
    # verbose=False: a text longer than the model's context is cut into windows here, the warning would be wrong.
    return tokenizer(text, verbose=False, **options)
