"""transformers: load and memory in fresh processes; prefill, decode and training steps of both models in this one."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.benchmarking.models import Pair, read_files
from sparse_rt.benchmarking.rows import SIDES, Row, calls_for, calls_note, generation_rows, in_turn, timed
from sparse_rt.benchmarking.training import TrainingStep, adapted, adapter_plan, random_tokens, training_note
from sparse_rt.child import in_fresh_process
from sparse_rt.config import BenchOptions
from sparse_rt.device import pick_device
from sparse_rt.hf.load import load
from sparse_rt.progress import Progress

NAME = "hf"
PHASES = ("load", "memory", "prefill", "decode", "train")


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    rows: list[Row] = []
    if "load" in phases or "memory" in phases:
        rows += fresh_rows(pair, options, phases, progress)
    if {"prefill", "decode", "train"} & set(phases):
        device = pick_device(options.device)
        progress.stage("loading both models")
        models = {side: load(getattr(pair, side).folder, dtype=pair.dtype).to(device) for side in SIDES}
        if "prefill" in phases or "decode" in phases:
            steps = options.new_tokens - 1 if "decode" in phases else 0  # the prefill gives the first new token
            for batch in options.batch:
                measured = inference_rows(models, batch, steps, options, progress)
                rows += [row for row in measured if row.phase in phases]
        if "train" in phases:  # last: the adapters are attached in place
            rows.append(train_row(models, pair, options, progress))
    return rows, {"dtype": pair.dtype, "attention": "as transformers chooses", "dense_linear": "torch.nn.Linear"}


def fresh_rows(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> list[Row]:
    """Load time and memory, one process a sample, dense and sparse in turn."""
    for side in SIDES:
        read_files(header.file for header in getattr(pair, side).headers)
    request = {
        "device": str(pick_device(options.device)),
        "dtype": pair.dtype,
        "threads": torch.get_num_threads(),
        "tokens": options.prompt_tokens,
        "train_tokens": options.train_tokens if {"memory", "train"} <= set(phases) else 0,
        "adapter": adapter_plan(pair),
    }

    def worker(side: str) -> Callable[[], dict[str, Any]]:
        folder = str(getattr(pair, side).folder.absolute())
        return lambda: in_fresh_process("sparse_rt.benchmarking.fresh:load_once", {**request, "folder": folder})

    dense, sparse = in_turn(worker("dense"), worker("sparse"), options.repeats, progress, "load and memory")
    before = statistics.median([sample["before"] or 0 for sample in (*dense, *sparse)]) / 1e6
    forward = f"one forward pass of {options.prompt_tokens} tokens"
    process = f"fresh process, {forward}; {before:.0f} MB of it are Python and libraries before the model is loaded"
    warm = "fresh process, files in the page cache, imports not counted"
    trained = f"fresh process, two steps on {options.train_tokens} tokens, adapters and optimizer as in the timed step"
    kinds = (
        ("load", "ready", "ready (one forward pass done)", "s", f"{warm}; {forward}"),
        ("load", "load", "load() alone", "s", f"{warm}; a dense file is only mapped by then, a sparse one is checked"),
        ("memory", "tensors", "tensors of the model", "bytes", f"parameters, buffers and run-time layouts, {forward}"),
        ("memory", "steady", "process after one forward pass", "bytes", process),
        ("memory", "peak", "process at its peak", "bytes", process),
        ("memory", "gpu_peak", "GPU at its peak", "bytes", f"fresh process, {forward}"),
        ("memory", "train_peak", "process at its peak in training", "bytes", trained),
    )
    return [
        Row(NAME, phase, what, unit, [s[key] for s in dense], [s[key] for s in sparse], note=note)
        for phase, key, what, unit, note in kinds
        if phase in phases and all(sample.get(key) is not None for sample in (*dense, *sparse))
    ]


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Logits of the last position only, as in generation, where the model can be asked for them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class Generation:
    """Greedy generation with a key-value cache, in its two parts: ``prefill`` and single-token ``decode`` steps."""

    def __init__(self, model: nn.Module, batch: int, prompt_tokens: int):
        self.model, self.ids = model, random_tokens(model, batch, prompt_tokens)
        self.options = forward_options(model)
        self.device = model.device

    @torch.inference_mode()
    def prefill(self) -> tuple[Tensor, Any]:
        """(next token [batch, 1], cache) after the prompt."""
        output = self.model(self.ids, use_cache=True, **self.options)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    @torch.inference_mode()
    def decode(self, token: Tensor, cache: Any, steps: int) -> Tensor:
        for _ in range(steps):
            output = self.model(token, past_key_values=cache, use_cache=True)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        return token

    def sample(self, steps: int, calls: int) -> tuple[float, float]:
        """Median seconds of a prefill and of one decode step (0 steps: 0.0) over ``calls`` generations."""
        prefills, decodes = [], []
        for _ in range(calls):
            seconds, (token, cache) = timed(self.prefill, self.device)
            prefills.append(seconds)
            if steps:
                seconds, _ = timed(lambda token=token, cache=cache: self.decode(token, cache, steps), self.device)
                decodes.append(seconds / steps)
        return statistics.median(prefills), statistics.median(decodes) if decodes else 0.0


def inference_rows(
    models: dict[str, nn.Module], batch: int, steps: int, options: BenchOptions, progress: Progress
) -> list[Row]:
    """Prefill and decode at one batch size, from the same generations."""
    sides = {side: Generation(model, batch, options.prompt_tokens) for side, model in models.items()}
    warm = [side.sample(min(steps, 2), 1) for side in sides.values()]
    calls = calls_for(max(prefill for prefill, _ in warm))
    dense, sparse = in_turn(
        lambda: sides["dense"].sample(steps, calls),
        lambda: sides["sparse"].sample(steps, calls),
        options.repeats,
        progress,
        f"prefill and decode, batch {batch}",
    )
    return generation_rows(NAME, dense, sparse, batch, options, calls_note(calls))


def train_row(models: dict[str, nn.Module], pair: Pair, options: BenchOptions, progress: Progress) -> Row:
    """Forward, backward and AdamW of an adapter; see ``training``."""
    plan = adapter_plan(pair)
    steps = {side: TrainingStep(adapted(model, plan), options.train_tokens) for side, model in models.items()}
    for step in steps.values():
        step.run()  # the first step creates the optimizer's state
    seconds = in_turn(steps["dense"].seconds, steps["sparse"].seconds, options.repeats, progress, "training step")
    what, note = f"one step on {options.train_tokens} tokens", training_note(**steps, plan=plan)
    return Row(NAME, "train", what, "s", *seconds, batch=1, tokens=options.train_tokens, note=note)
