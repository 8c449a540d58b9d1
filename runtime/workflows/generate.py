"""A quick look at what a model says: greedy continuation of one prompt."""

from __future__ import annotations

import time
from typing import Any

import torch

from sparse_rt.config import GenerateOptions
from sparse_rt.device import pick_device
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.progress import Progress


def generate(options: GenerateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Continue ``options.prompt`` greedily; returns the text, the token ids and tokens a second."""
    progress = progress or Progress()
    progress.stage("loading the model")
    tokenizer = load_tokenizer(options.model, options.revision)
    model = load(options.model, revision=options.revision).to(pick_device(options.device))
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].numel() == 0:
        raise UserError("the prompt has no tokens; give some text")
    start = time.perf_counter()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {
        "model": str(options.model),
        "prompt": options.prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new.tolist(),
        "tokens_per_second": round(len(new) / seconds, 2),
    }
