"""Masked full fine-tuning: the kept values themselves are trained, at their positions and nowhere else.

    W_eff = W + D,   D zero outside the mask

D is stored as the values are, in float32, so that W + D is a float32 master weight of the kept values: it is rounded to
the dtype of the values once, when the product needs it, and an update too small for bfloat16 adds up instead of being
lost. The gradient is dY^T X at the kept positions, written once; the dense gradient never exists. This is what the
recovery recipes for pruned models train (Sparse fine-tuning with SquareHead, Kurtic et al., arXiv 2310.06927).

The largest of the adapters: 4 bytes a kept value, and with AdamW 8 bytes more for its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_rt.adapters.base import AdapterConfig, AdapterLayer, SparseAdapterModel
from sparse_rt.adapters.effective import Fused, Rows, Weight, WeightShape
from sparse_rt.adapters.registry import register_adapter
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops


@dataclass
class ValuesConfig(AdapterConfig):
    """Options of masked full fine-tuning: those that every adapter has."""

    name: ClassVar[str] = "values"


class ValuesLayer(AdapterLayer):
    """D in the shape of the values, zero."""

    adapter_layer_names = ("values_delta",)

    @classmethod
    def new_parameters(cls, config: ValuesConfig, shape: WeightShape) -> tuple[Tensor]:
        m, n, pattern, nnz = shape
        return (torch.zeros(get_format(pattern).values_shape(m, n, nnz), dtype=torch.float32),)

    @staticmethod
    def update(config: ValuesConfig, rows: Rows, delta: Tensor) -> Tensor:
        return rows.part(delta)

    @staticmethod
    def fused(config: ValuesConfig) -> Fused:
        return Fused(_refusal, _apply, _gradients)


def _refusal(weight: Weight, *tensors: Tensor) -> str | None:
    return None  # an addition and an operation that every backend has


def _apply(weight: Weight, out: Tensor, with_base: bool, delta: Tensor) -> None:
    """Block by block, because a CPU widens the values of a call into a temporary tensor."""
    values, flat, delta = weight.values.detach().flatten(), out.view(-1), delta.detach().flatten()
    for block in weight.blocks:
        part = slice(block.begin, block.end)
        if with_base:
            torch.add(values[part], delta[part], out=flat[part])
        else:
            flat[part] = delta[part]


def _gradients(weight: Weight, dy: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor]:
    return (ops.values_grad(dy, x, weight.metadata, weight.pattern, weight.m, weight.n, delta),)


@register_adapter
class ValuesModel(SparseAdapterModel):
    name = "values"
    prefix = "values_delta"
    config_cls = ValuesConfig
    tuner_layer_cls = ValuesLayer
    # Of the recipe for 2:4, 60% and 80% in arXiv 2310.06927 (billions of parameters); small models want more.
    learning_rate = 1e-4
