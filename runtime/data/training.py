"""Documents as rows to train on: tokens, labels, and which tokens see each other."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_rt import assets
from sparse_rt.data import chat
from sparse_rt.data.shapes import Document, documents
from sparse_rt.data.texts import tokenize
from sparse_rt.errors import UserError
from sparse_rt.optional import require

# Label of a token that is not learnt: the loss of transformers leaves it out.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence: int32 arrays [length] of tokens and of labels (the token itself or ``IGNORED``)."""

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def training_dataset(source: str | Path | None, tokenizer, max_seq_len: int, seed: int = 0, **options):
    """A ``datasets.Dataset`` of all of ``source``: ``training_split`` without an evaluation part."""
    return training_split(source, tokenizer, max_seq_len, seed, **options)[0]


def training_split(
    source: str | Path | None,
    tokenizer,
    max_seq_len: int,
    seed: int = 0,
    *,
    eval_fraction: float = 0.0,
    completion_only: bool = False,
    packing: bool = False,
    note: Callable[[str], None] | None = None,
):
    """(rows to train on, rows to evaluate or None) as ``datasets.Dataset`` (source None: the shipped fine-tuning text).

    Columns are input_ids, labels and attention_mask, or with ``packing`` position_ids instead of the mask. The loss
    counts every token, as in the recipe of SPP (arXiv 2405.16057), or with ``completion_only`` those of answers. Each
    text ends with the end token. Plain text longer than ``max_seq_len`` is cut into consecutive pieces, so that none of
    it is lost; a conversation or an instruction is truncated, because a piece without its beginning teaches nothing.
    ``seed`` shuffles the rows. ``eval_fraction`` sets whole texts aside, of a single text its end. ``note`` is told
    what was left out.
    """
    source = assets.finetune_jsonl() if source is None else source
    found, texts, silent = [], 0, 0
    for document in documents(source, tokenizer):
        texts += 1
        pieces = _pieces(document, tokenizer, max_seq_len, completion_only)
        # The first token of a piece is never predicted: without another label it trains nothing.
        kept = [piece for piece in pieces if (piece.labels[1:] != IGNORED).any()]
        silent += not kept
        if kept:
            found.append(kept)
    if not found:
        reason = "no text" if not texts else f"nothing to learn in its {texts} rows"
        raise UserError(
            f"data set {source} holds {reason} to train on (sequences of at least 2 and at most {max_seq_len} tokens"
            f"{', with a token of an answer' if completion_only else ''}); give longer texts"
        )
    if silent and note is not None:
        note(f"{silent} of {texts} rows are left out: within {max_seq_len} tokens there is nothing to learn")
    train, held_out = _split(found, eval_fraction, seed, source)
    random.Random(seed).shuffle(train)
    build = _packed if packing else _padded
    return build(train, max_seq_len, seed), build(held_out, max_seq_len, seed) if held_out else None


def _pieces(document: Document, tokenizer, max_seq_len: int, completion_only: bool) -> list[Row]:
    tokens, learnt = _encode(document, tokenizer, completion_only)
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        learnt += learnt[-1:] or [True]  # the end belongs to whoever spoke last
        tokens += [end]
    ids = np.array(tokens, dtype=np.int32)
    labels = np.where(np.array(learnt, dtype=bool), ids, IGNORED).astype(np.int32)
    stop = len(tokens) if document.is_plain else min(max_seq_len, len(tokens))
    cuts = [slice(start, min(start + max_seq_len, stop)) for start in range(0, stop, max_seq_len)]
    return [Row(ids[cut], labels[cut]) for cut in cuts]


def _encode(document: Document, tokenizer, completion_only: bool) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is learnt). The ids do not depend on ``completion_only``.

    A token belongs to an answer when it begins there. Chat templates write special tokens themselves.
    """
    special = document.messages is None
    if not completion_only:
        tokens = list(tokenize(tokenizer, document.text, add_special_tokens=special)["input_ids"])
        return tokens, [True] * len(tokens)
    if document.is_plain:
        raise UserError(
            f"{document.where} is plain text, which has no prompt and no answer; leave out completion_only, or give "
            "rows with messages, conversations, prompt and completion, or instruction and output"
        )
    if document.messages is not None:
        if not document.answers:
            raise UserError(f"{document.where} has no assistant turn; completion_only learns nothing else")
        # Tags mark every answer; where a prompt holds answers that are not to be learnt, only spans can tell.
        every = tuple(i for i, turn in enumerate(document.messages) if turn["role"] == "assistant")
        if chat.has_generation_tags(tokenizer) and document.answers == every:
            return chat.answered_tokens(document.messages, tokenizer, document.where)
        spans = chat.answer_spans(document.messages, document.answers, tokenizer, document.where)
    else:
        spans = [(document.answer, len(document.text))]
    if not tokenizer.is_fast:
        raise UserError("completion_only needs a tokenizer with a tokenizer.json: it says where each token begins")
    found = tokenize(tokenizer, document.text, add_special_tokens=special, return_offsets_mapping=True)
    starts = [start if stop > start else -1 for start, stop in found["offset_mapping"]]  # added tokens have no place
    return list(found["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]


def _split(found: list[list[Row]], fraction: float, seed: int, source) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole texts are held out, chosen by ``seed``; of a single text its last pieces."""
    if not fraction:
        return [row for rows in found for row in rows], []
    groups = list(found)
    if len(groups) == 1:
        groups = [[row] for row in groups[0]]
    else:
        random.Random(seed).shuffle(groups)
    wanted, held_out = fraction * sum(map(len, groups)), []
    while len(groups) > 1 and len(held_out) < wanted:
        held_out += groups.pop()
    if not held_out:
        raise UserError(f"data set {source} is a single sequence; eval_fraction needs more, or give eval_dataset")
    return [row for rows in groups for row in rows], held_out


def _padded(rows: list[Row], max_seq_len: int, seed: int):
    masks = [np.ones(len(row), dtype=np.int8) for row in rows]
    columns = {"input_ids": [row.tokens for row in rows], "labels": [row.labels for row in rows]}
    return require("datasets", extra="train").Dataset.from_dict({**columns, "attention_mask": masks})


def _packed(rows: list[Row], max_seq_len: int, seed: int):
    """Several rows in one, by best fit of the longest first; positions start again at each, by which attention is cut.

    The label of a row's first token is left out: the token before it belongs to another text.
    """
    bins: list[list[Row]] = []
    space: list[tuple[int, int]] = []  # (room left, index of the bin), sorted
    for row in sorted(rows, key=len, reverse=True):
        place = bisect.bisect_left(space, (len(row), 0))
        room, index = space.pop(place) if place < len(space) else (max_seq_len, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(row)
        if room > len(row):
            bisect.insort(space, (room - len(row), index))
    random.Random(seed).shuffle(bins)
    first = np.array([IGNORED], dtype=np.int32)
    columns = {
        "input_ids": [np.concatenate([row.tokens for row in group]) for group in bins],
        "labels": [np.concatenate([part for row in group for part in (first, row.labels[1:])]) for group in bins],
        "position_ids": [np.concatenate([np.arange(len(row), dtype=np.int32) for row in group]) for group in bins],
    }
    return require("datasets", extra="train").Dataset.from_dict(columns)
