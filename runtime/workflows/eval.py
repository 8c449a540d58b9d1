"""Perplexity on a text, or lm-evaluation-harness tasks."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from sparse_rt import assets
from sparse_rt.config import EvalOptions
from sparse_rt.data import read_texts, token_windows
from sparse_rt.device import pick_device
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load_generator, load_tokenizer
from sparse_rt.optional import require
from sparse_rt.progress import Progress

# Tokens of one forward pass: long enough to be efficient, short enough for the logits of a large vocabulary.
BATCH_TOKENS = 2048


def eval(options: EvalOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate a dense or compressed model; the result carries the context length with every figure.

    Raises ``UserError`` when the text is shorter than one context window or the model's context is too short.
    """
    progress = progress or Progress()
    start = time.perf_counter()
    model = load_generator(options.model, revision=options.revision).to(pick_device(options.device))
    tokenizer = load_tokenizer(options.model, options.revision)
    if options.tasks:
        result = run_tasks(model, tokenizer, options, progress)
    else:
        result = perplexity(model, tokenizer, options, progress)
    return {"model": str(options.model), **result, "seconds": round(time.perf_counter() - start, 2)}


def perplexity(model, tokenizer, options: EvalOptions, progress: Progress) -> dict[str, Any]:
    """exp of the mean negative log-likelihood over non-overlapping windows; each window predicts all but its first."""
    dataset = options.dataset or assets.heldout_text()
    limit = getattr(model.config, "max_position_embeddings", options.max_seq_len)
    length = min(options.max_seq_len, limit)
    if length < options.max_seq_len:
        progress.note(f"context {length}: the model has {limit} positions")
    windows = token_windows(read_texts(dataset, tokenizer), tokenizer, length)[: options.max_samples]
    total, count = 0.0, 0
    step = max(1, BATCH_TOKENS // length)
    for batch in progress.track(windows.split(step), "perplexity", total=math.ceil(len(windows) / step)):
        total += negative_log_likelihood(model, batch.to(model.device))
        count += batch.shape[0] * (length - 1)
    return {
        "perplexity": math.exp(total / count),
        "nll_per_token": total / count,
        "context_length": length,
        "windows": len(windows),
        "tokens": count,
        "dataset": str(dataset),
    }


@torch.no_grad()
def negative_log_likelihood(model, ids: torch.Tensor) -> float:
    """Summed -log p of ids[:, 1:] given what stands before, ids [b, length]."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()


def run_tasks(model, tokenizer, options: EvalOptions, progress: Progress) -> dict[str, Any]:
    """Scores of lm-evaluation-harness, by the model object (compressed weights stay compressed)."""
    harness = require("lm_eval", "eval")
    from lm_eval.models.huggingface import HFLM

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    progress.stage(f"lm-evaluation-harness: {', '.join(names)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    try:
        scores = harness.simple_evaluate(model=wrapped, tasks=names, limit=options.max_samples)
    except (KeyError, ValueError) as error:
        raise UserError(f"lm-evaluation-harness refused the tasks {options.tasks!r}: {error}") from error
    return {"tasks": scores["results"]}
