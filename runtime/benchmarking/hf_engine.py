"""transformers: load and memory in fresh processes; prefill, decode and training steps of both models in this one."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.benchmarking.models import Pair, read_files
from sparse_rt.benchmarking.rows import SIDES, Row, calls_for, calls_note, generation_rows, in_turn, timed
from sparse_rt.child import in_fresh_process
from sparse_rt.config import BenchOptions
from sparse_rt.device import pick_device
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears
from sparse_rt.progress import Progress

NAME = "hf"
PHASES = ("load", "memory", "prefill", "decode", "train")
LEARNING_RATE = 1e-4
SPP_GROUPS = 16


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    rows: list[Row] = []
    if "load" in phases or "memory" in phases:
        rows += [row for row in fresh_rows(pair, options, progress) if row.phase in phases]
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
            rows.append(train_row(models, options, progress))
    return rows, {"dtype": pair.dtype, "attention": "as transformers chooses", "dense_linear": "torch.nn.Linear"}


def fresh_rows(pair: Pair, options: BenchOptions, progress: Progress) -> list[Row]:
    """Load time and memory, one process a sample, dense and sparse in turn."""
    for side in SIDES:
        read_files(header.file for header in getattr(pair, side).headers)

    def worker(side: str) -> Callable[[], dict[str, Any]]:
        request = {
            "folder": str(getattr(pair, side).folder.absolute()),
            "device": str(pick_device(options.device)),
            "dtype": pair.dtype,
            "tokens": options.prompt_tokens,
        }
        return lambda: in_fresh_process("sparse_rt.benchmarking.fresh:load_once", request)

    dense, sparse = in_turn(worker("dense"), worker("sparse"), options.repeats, progress, "load and memory")
    before = statistics.median([sample["before"] or 0 for sample in (*dense, *sparse)]) / 1e6
    forward = f"one forward pass of {options.prompt_tokens} tokens"
    process = f"fresh process, {forward}; {before:.0f} MB of it are Python and libraries before the model is loaded"
    warm = "fresh process, files in the page cache, imports not counted"
    kinds = (
        ("load", "ready", "ready (one forward pass done)", "s", f"{warm}; {forward}"),
        ("load", "load", "load() alone", "s", f"{warm}; a dense file is only mapped by then, a sparse one is checked"),
        ("memory", "parameters", "parameters and buffers", "bytes", None),
        ("memory", "steady", "process after one forward pass", "bytes", process),
        ("memory", "peak", "process at its peak", "bytes", process),
        ("memory", "gpu_peak", "GPU at its peak", "bytes", f"fresh process, {forward}"),
    )
    return [
        Row(NAME, phase, what, unit, [s[key] for s in dense], [s[key] for s in sparse], note=note)
        for phase, key, what, unit, note in kinds
        if all(sample[key] is not None for sample in (*dense, *sparse))
    ]


def random_tokens(model: nn.Module, batch: int, length: int) -> Tensor:
    """int64 [batch, length] on the device of the model; the time of a step does not depend on which tokens they are."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


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


def train_row(models: dict[str, nn.Module], options: BenchOptions, progress: Progress) -> Row:
    """Forward, backward and AdamW: SPP on the compressed model, LoRA of about as many parameters on the dense one.

    Both come from PEFT and keep their parameters in float32. Raises ``UserError`` when PEFT is not installed.
    """
    from sparse_rt.adapters.spp import SPPConfig  # imports PEFT, with our sentence when it is missing

    layers = dict(sparse_linears(models["sparse"]))
    sizes = [layer.out_features + layer.in_features for layer in layers.values()]
    groups = math.gcd(SPP_GROUPS, *(layer.out_features for layer in layers.values()))
    from peft import LoraConfig, get_peft_model

    sparse = get_peft_model(models["sparse"], SPPConfig(groups=groups))
    rank = max(1, round(_trainable(sparse) / sum(sizes)))
    dense = get_peft_model(models["dense"], LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers)))
    steps = {"dense": TrainingStep(dense, options.train_tokens), "sparse": TrainingStep(sparse, options.train_tokens)}
    for step in steps.values():
        step.run()  # the first step creates the optimizer's state
    seconds = in_turn(steps["dense"].seconds, steps["sparse"].seconds, options.repeats, progress, "training step")
    note = (
        f"sparse: SPP, {groups} groups, {_trainable(sparse)} parameters; dense: LoRA, rank {rank}, "
        f"{_trainable(dense)} parameters; same {len(layers)} layers, AdamW"
    )
    what = f"one step on {options.train_tokens} tokens"
    return Row(NAME, "train", what, "s", *seconds, batch=1, tokens=options.train_tokens, note=note)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class TrainingStep:
    """Forward, backward and optimizer on one fixed sequence."""

    def __init__(self, model: nn.Module, tokens: int):
        self.model = model.train()
        self.ids = random_tokens(model, 1, tokens)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)

    def run(self) -> float:
        """The loss before the step."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self) -> float:
        return timed(self.run, self.ids.device)[0]
