"""A quick look at what a model says: greedy continuation of one prompt."""

from __future__ import annotations

import time
from typing import Any

import torch

from sparse_rt.config import GenerateOptions
from sparse_rt.device import pick_device
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load_generator, load_tokenizer
from sparse_rt.progress import Progress


def generate(options: GenerateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Continue ``options.prompt`` greedily; returns the text, the token ids, tokens a second and what ran."""
    progress = progress or Progress()
    progress.stage("loading the model")
    tokenizer = load_tokenizer(options.model, options.revision)
    prompt = tokenizer(options.prompt)["input_ids"]
    if not prompt:
        raise UserError("the prompt has no tokens; give some text")
    new, seconds, engine = {"hf": _transformers, "onnx": _onnx}[options.engine](prompt, options)
    return {
        "model": str(options.model),
        "engine": engine,
        "prompt": options.prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new,
        "tokens_per_second": round(len(new) / seconds, 2),
    }


def _transformers(prompt: list[int], options: GenerateOptions) -> tuple[list[int], float, str]:
    """New tokens, seconds, and what ran."""
    model = load_generator(options.model, revision=options.revision).to(pick_device(options.device))
    ids = torch.tensor([prompt], device=model.device)
    start = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.max_new_tokens, do_sample=False
        )
    return found[0, len(prompt) :].tolist(), time.perf_counter() - start, f"transformers on {model.device}"


def _onnx(prompt: list[int], options: GenerateOptions) -> tuple[list[int], float, str]:
    from sparse_rt.exporters.onnx.generation import OnnxModel, end_of_text

    if options.device not in ("auto", "cpu"):
        raise UserError(f"device {options.device}: the engine onnx runs on the CPU; leave device out")
    model = OnnxModel(options.model)
    kernel = model.kernel
    start = time.perf_counter()
    (new,) = model.generate(prompt, options.max_new_tokens, eos=end_of_text(options.model))
    return (
        new.tolist(),
        time.perf_counter() - start,
        f"onnxruntime {model.ort.__version__}, compressed layers: {kernel}",
    )
