"""How far the map of a task is from that of the task before it, added to the loss (continual learning).

With m the map, p the reference, U the number of maps (units times layers), lambda the option ``similarity``:

    frob     lambda / U  sum over maps of |m - p|^2 / |p|^2
    cos      lambda / U  sum over maps of (1 - cos(m, p)), blind to a common factor of all channels
    taylor   lambda  sum over entries of w_i (m_i - p_i)^2,  w_i = mean over steps of |g_i (m_i - p_i)|

g_i is the gradient of the loss without the penalty, so that w_i is the first-order share of entry i in what the task
gained since p: linear in the number of parameters, as in path-integral methods. w is a part of the adapter (float32,
not trained): a resumed run goes on with the same bits, and a later task starts from it. It is in nats squared less than
one, so lambda of taylor is some orders larger than that of the other two.

The reference is the map that the run started from, the identity for a first task.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainerCallback

from sparse_rt.adapters.dcft.layers import Scale
from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.errors import UserError

KINDS = ("none", "frob", "cos", "taylor")


def frob(a: Tensor, reference: Tensor) -> Tensor:
    """|m - p|^2 / |p|^2 of m = 1 + a, p = 1 + reference."""
    return (a - reference).square().sum() / (1 + reference).square().sum()


def cos(a: Tensor, reference: Tensor) -> Tensor:
    """1 - cos(m, p), as half the squared distance of the unit vectors: no difference of numbers near one."""
    m, p = 1 + a, 1 + reference
    return (m / m.norm() - p / p.norm()).square().sum() / 2


def taylor(a: Tensor, reference: Tensor, importance: Tensor) -> Tensor:
    """sum of w (m - p)^2."""
    return (importance * (a - reference).square()).sum()


def training_parts(layers: list[Scale], adapter_name: str, config, arguments) -> TrainingParts:
    """The penalty of a run that trains ``adapter_name`` in ``layers``."""
    kind, strength = config.penalty, config.similarity
    if kind == "none" or strength == 0:
        return TrainingParts()
    if kind == "taylor":
        if arguments.fp16:
            raise UserError("the penalty taylor reads gradients, which fp16 scales by a changing factor; use bf16")
        for layer in layers:
            layer.watched, layer.gradient = adapter_name, None
        penalty = _over(layers, adapter_name, lambda a, p, w: strength * taylor(a, p, w))
        return TrainingParts(callbacks=(Importance(layers, adapter_name),), penalties=(penalty,))
    distance = {"frob": frob, "cos": cos}[kind]
    return TrainingParts(
        penalties=(_over(layers, adapter_name, lambda a, p, *_: strength / len(layers) * distance(a, p)),)
    )


def _over(layers: list[Scale], name: str, term: Callable[..., Tensor]) -> Callable[[], Tensor]:
    def penalty() -> Tensor:
        total: Tensor | float = 0.0
        for layer in layers:
            a, *state = (_whole(parameter) for parameter in layer.parameters_of(name))
            value = term(a, reference_of(layer, name, a), *state[:1])
            total = total + value.to(total.device if isinstance(total, Tensor) else value.device)
        return total

    return penalty


def reference_of(layer: Scale, name: str, a: Tensor) -> Tensor:
    """The map of the task before, less one, beside ``a``."""
    reference = layer.reference.get(name)
    return torch.zeros_like(a) if reference is None else reference.to(device=a.device, dtype=a.dtype)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP2 shards, gathered; differentiable."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


class Importance(TrainerCallback):
    """Keeps w of ``taylor``: a mean over all optimizer steps, also over those of earlier tasks."""

    def __init__(self, layers: list[Scale], adapter_name: str):
        self.layers, self.name = layers, adapter_name

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for layer in self.layers:
            if layer.gradient is None:
                continue
            a, importance, steps = layer.parameters_of(self.name)
            gradient = layer.gradient
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(gradient)
                gradient = gradient / torch.distributed.get_world_size()
            moved = a - reference_of(layer, self.name, a)
            steps += 1
            importance += ((gradient * moved).abs() - importance) / steps
            layer.gradient = None

    def on_train_end(self, args, state, control, **kwargs):
        for layer in self.layers:
            layer.watched = layer.gradient = None
