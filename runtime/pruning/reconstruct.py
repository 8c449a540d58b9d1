"""Block-wise local reconstruction: the kept weights of one pruned block are trained to give the dense block's output.

"A Free Lunch in LLM Compression: Revisiting Retraining after Pruning" (arXiv 2510.14444), with whole decoder blocks as
the window, because single matrices do worse than any window with a non-linearity in it. The variant:

    minimise  sum || f(h; kept values) - t ||^2     over the calibration tokens

where h is what the block sees in the *pruned* model (all blocks before it pruned and reconstructed), and t is what the
dense block gives in the *dense* model. A block so makes up for errors of those before it too. The mask, norms and
biases stay as they are.

Training runs in float32 whatever the dtype of the model: the difference of two outputs is small beside them. The kept
values are compressed all the time (``SparseLinear`` with trainable values: the gradient exists at the kept positions
only), so a block takes 16 bytes a kept weight with AdamW's state, and the activations of one sequence.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.formats.wrapper import Wrapper
from sparse_rt.kernels import ops
from sparse_rt.nn import SparseLinear
from sparse_rt.pruning.calibrate import BlockRunner

# Sequences of a step. On the shipped model (Wanda 2:4, 256 sequences of 256 tokens a block in all), twice the steps
# with half the sequences gave perplexity 12.18 where 12.53, and the learning rates 0.003, 0.01 and 0.02 gave 12.84,
# 12.18 and 11.97 (13.66 without reconstruction). Other models were not tried: hence a default that is not the largest.
BATCH = 2
# Share of the steps in which the learning rate rises; it falls as a cosine over the rest.
WARMUP = 0.1


@dataclass(frozen=True)
class Compressed:
    """A pruned weight as it is stored; with a ``wrapper``, values and metadata are those of its core."""

    pattern: str
    values: Tensor
    metadata: Tensor
    wrapper: Wrapper | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Compressed:
        """On ``device``, values and wrapper in ``dtype`` (None: as they are)."""
        wrapper = self.wrapper and self.wrapper.to(device, dtype)
        return Compressed(self.pattern, self.values.to(device, dtype), self.metadata.to(device), wrapper)

    def dense(self, m: int, n: int) -> Tensor:
        """What a linear layer (m, n) multiplies with: [m, n] in the dtype of the values."""
        core = ops.decompress(self.values, self.metadata, self.pattern, m, n)
        return core if self.wrapper is None else self.wrapper.dense(core)


@dataclass(frozen=True)
class Schedule:
    """``learning_rate`` is a share of the root mean square of a weight's kept values, so it suits any scale of them.

    (An AdamW step moves each value by about the learning rate, whatever the size of the gradients.)
    """

    steps: int
    learning_rate: float
    seed: int = 0

    def factor(self, step: int) -> float:
        """Of the learning rate in ``step`` = 0, 1, ..., steps - 1."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def order(self, block: int, sequences: int) -> list[list[int]]:
        """The sequences of every step: reshuffled each time all were used, the same for a block whoever asks."""
        generator, drawn = random.Random(f"{self.seed}:{block}"), []
        while len(drawn) < self.steps * BATCH:
            drawn += generator.sample(range(sequences), sequences)
        return [drawn[start : start + BATCH] for start in range(0, self.steps * BATCH, BATCH)]


def reconstruct(
    runner: BlockRunner, index: int, weights: dict[str, Compressed], schedule: Schedule
) -> dict[str, Tensor]:
    """Train the ``weights`` (names inside the block) of block ``index``; their new values, float32.

    They are not finite when the learning rate is far too high.

    ``runner`` holds the block open, the inputs in ``hidden`` and the dense outputs in ``dense``; nothing of it changes.
    """
    twin = _twin(runner.blocks[index], weights, runner.device)
    values = {name: twin.get_submodule(name).weight_values for name in weights}
    groups = [{"params": [value], "lr": schedule.learning_rate * _rms(value)} for value in values.values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    scale = sum(float(target.float().square().mean()) for target in runner.dense) / len(runner.dense)
    for step, batch in enumerate(schedule.order(index, len(runner.hidden))):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step)
        for sequence in batch:
            args, kwargs = widened(runner.call(index, sequence))
            output = twin(runner.hidden[sequence].to(runner.device, torch.float32), *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            target = runner.dense[sequence].to(runner.device, torch.float32)
            ((output - target).square().mean() / (scale * len(batch))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in values.items()}


def _twin(block: nn.Module, weights: dict[str, Compressed], device: torch.device) -> nn.Module:
    """A float32 copy of ``block`` whose ``weights`` are compressed and the only thing that is trained.

    They take the place of the dense ones while the copy is made, so that those are not copied.
    """
    dense = {name: block.get_submodule(name) for name in weights}
    try:
        for name, weight in weights.items():
            m, n = dense[name].weight.shape
            weight = weight.to(device, torch.float32)
            stored = weight.pattern, weight.values, weight.metadata, dense[name].bias, weight.wrapper
            _put(block, name, SparseLinear(n, m, *stored))
        configs = {id(part.config): part.config for part in block.modules() if hasattr(part, "config")}
        twin = copy.deepcopy(block, configs).float().requires_grad_(False)
    finally:
        for name, linear in dense.items():
            _put(block, name, linear)
    for name in weights:
        twin.get_submodule(name).weight_values.requires_grad_(True)
    return twin


def _put(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


def _rms(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt())


def widened(value: Any) -> Any:
    """``value`` with every floating-point tensor in it (masks, rotations) in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(widened(part) for part in value)
    if isinstance(value, dict):
        return {key: widened(part) for key, part in value.items()}
    return value
