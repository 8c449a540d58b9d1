"""SPP (Lu et al., ICML 2024, arXiv 2405.16057): every kept weight times a factor of its row and its column group.

    W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]),   g(i) = floor(i groups / m)

The update is a product with W, so zeros stay zero. Per group of rows, sum_i B_i dB_i = sum_j A_j dA_j.
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
from sparse_rt.kernels import factors


@dataclass
class SPPConfig(AdapterConfig):
    """Options of SPP; the defaults are those of the authors' code (16 groups, scale = 16 / 8)."""

    groups: int = field(default=16, metadata={"help": "contiguous groups of rows that share a row of A"})
    scale: float = field(default=2.0, metadata={"help": "s in W (1 + s B A)"})

    name: ClassVar[str] = "spp"

    def __post_init__(self):
        super().__post_init__()
        if self.groups < 1:
            raise UserError(f"groups must be at least 1, got {self.groups!r}")


class SPPLayer(AdapterLayer):
    """A [groups, n], uniform within 1/sqrt(n); B [m], zero: the first step moves B only, since dA is zero there."""

    adapter_layer_names = ("spp_A", "spp_B")

    @classmethod
    def refuse(cls, config: SPPConfig, m: int, n: int) -> str | None:
        if m % config.groups == 0:
            return None
        allowed = [g for g in range(1, min(m, 64) + 1) if m % g == 0]
        return f"its {m} rows cannot be cut into {config.groups} equal groups; allowed are {allowed}"

    @classmethod
    def new_parameters(cls, config: SPPConfig, shape: WeightShape) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(shape.n)
        a = torch.empty(config.groups, shape.n, dtype=torch.float32).uniform_(-bound, bound)
        return a, torch.zeros(shape.m, dtype=torch.float32)

    @staticmethod
    def update(config: SPPConfig, rows: Rows, a: Tensor, b: Tensor) -> Tensor:
        # Row i of `spread` holds B[i] in the column of its group: spread @ A is B_i A_g(i) without a copy of A per row,
        # and its gradients are two small products instead of row and column sums over the block.
        groups = torch.arange(rows.start, rows.stop, device=a.device) // (rows.m // config.groups)
        spread = torch.nn.functional.one_hot(groups, config.groups).to(b.dtype) * b[rows.start : rows.stop, None]
        return rows.values * rows.kept(spread @ a) * config.scale

    @staticmethod
    def fused(config: SPPConfig) -> Fused:
        return Fused(_refusal, functools.partial(_apply, config.scale), functools.partial(_gradients, config.scale))


def _refusal(weight: Weight, *tensors: Tensor) -> str | None:
    return factors.refusal(weight.pattern, weight.m, weight.n, weight.values, *tensors)


def _apply(scale: float, weight: Weight, out: Tensor, with_base: bool, a: Tensor, b: Tensor) -> None:
    where = weight.values, weight.metadata, weight.pattern, weight.m, weight.n
    factors.apply(out, *where, a, b, scale, with_base)


def _gradients(scale: float, weight: Weight, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    where = weight.values, weight.metadata, weight.pattern, weight.m, weight.n
    return factors.gradients(dy, x, *where, a, b, scale)


@register_adapter
class SPPModel(SparseAdapterModel):
    name = "spp"
    prefix = "spp_"
    config_cls = SPPConfig
    tuner_layer_cls = SPPLayer
    learning_rate = 4e-3  # of the authors' recipe: the relative update is s B A with |A| about 1/sqrt(n)
