"""MaskLoRA (Zimmer et al., arXiv 2312.15230; LoRS, arXiv 2501.08582): a low-rank update at the kept positions only.

    W_eff = W + s (B A) . mask,   s = alpha / r

The mask stays as it is, so the adapter merges without bringing zeros back to life.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparse_rt.adapters.base import AdapterConfig, AdapterLayer, SparseAdapterModel
from sparse_rt.adapters.effective import Fused, Rows, Weight, WeightShape
from sparse_rt.adapters.registry import register_adapter
from sparse_rt.errors import UserError
from sparse_rt.kernels import low_rank


@dataclass
class MaskLoRAConfig(AdapterConfig):
    """Options of MaskLoRA; r and alpha as in LoRA."""

    r: int = field(default=8, metadata={"help": "rank of the update"})
    alpha: float = field(default=16.0, metadata={"help": "the update is scaled by alpha / r"})

    name: ClassVar[str] = "masklora"

    def __post_init__(self):
        super().__post_init__()
        if self.r < 1:
            raise UserError(f"r must be at least 1, got {self.r!r}")


class MaskLoRALayer(AdapterLayer):
    """A [r, n], Kaiming uniform as in LoRA; B [m, r], zero."""

    adapter_layer_names = ("masklora_A", "masklora_B")

    @classmethod
    def new_parameters(cls, config: MaskLoRAConfig, shape: WeightShape) -> tuple[Tensor, Tensor]:
        a = torch.empty(config.r, shape.n, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return a, torch.zeros(shape.m, config.r, dtype=torch.float32)

    @staticmethod
    def update(config: MaskLoRAConfig, rows: Rows, a: Tensor, b: Tensor) -> Tensor:
        return rows.kept(b[rows.start : rows.stop] @ a) * (config.alpha / config.r)

    @staticmethod
    def fused(config: MaskLoRAConfig) -> Fused:
        return Fused(_refusal, None, functools.partial(_gradients, config.alpha / config.r))


def _refusal(weight: Weight, *tensors: Tensor) -> str | None:
    return low_rank.refusal(weight.pattern, weight.m, weight.n, weight.values, *tensors)


def _gradients(scale: float, weight: Weight, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return low_rank.gradients(dy, x, weight.metadata, weight.pattern, weight.m, weight.n, a, b, scale)


@register_adapter
class MaskLoRAModel(SparseAdapterModel):
    name = "masklora"
    prefix = "masklora_"
    config_cls = MaskLoRAConfig
    tuner_layer_cls = MaskLoRALayer
    learning_rate = 5e-4  # of PERP, the first of the two papers
