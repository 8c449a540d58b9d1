"""The layers of DCFT: a vector that scales the rows or the columns of a compressed weight, or the weight of a norm.

The parameter is a = m - 1, float32 and zero at the start, so that weight decay pulls toward the identity and small
changes of m are not rounded away. Several active adapters add up: m = 1 + a_1 + a_2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_rt.adapters.base import AdapterLayer
from sparse_rt.adapters.effective import Rows, WeightShape
from sparse_rt.kernels import ops
from sparse_rt.kernels.columns import scale_columns


def spread(entries: Tensor, share: int, head_dim: int | None) -> Tensor:
    """An entry a channel from the entries that are trained; differentiable.

    ``share`` consecutive channels have one entry. With ``head_dim``, channels j and j + head_dim / 2 of a head have one
    (the two that a rotary embedding in the half-split layout turns together).
    """
    channels = entries.repeat_interleave(share) if share > 1 else entries
    if head_dim is None:
        return channels
    halves = channels.view(-1, head_dim // 2)
    return torch.cat((halves, halves), 1).flatten()


class Scale(AdapterLayer):
    """``dcft_a``: the map less one. With the penalty taylor also the importance of its entries and the steps in it."""

    adapter_layer_names = ("dcft_a", "dcft_importance", "dcft_steps")
    # Whether rope_tied means this layer.
    rotary: ClassVar[bool] = False

    def __init__(self, base_layer, adapter_name, config):
        # Map of the task before, by adapter; absent: the identity. A run sets it, it is not saved.
        self.reference: dict[str, Tensor] = {}
        # Adapter whose gradients of the loss (without penalties) are summed up, and the sum.
        self.watched: str | None = None
        self.gradient: Tensor | None = None
        super().__init__(base_layer, adapter_name, config)

    @classmethod
    def parameter_names(cls, config) -> tuple[str, ...]:
        return cls.adapter_layer_names if config.penalty == "taylor" else ("dcft_a",)

    @classmethod
    def width(cls, m: int, n: int) -> int:
        """Channels that are scaled."""
        return m

    @classmethod
    def refuse(cls, config, m: int, n: int) -> str | None:
        channels, what = cls.width(m, n), "channels"
        if cls._head_dim(config):
            if channels % config.head_dim or config.head_dim % 2:
                return f"its {channels} channels are no whole heads of {config.head_dim} channels in two halves"
            channels, what = channels // 2, "pairs of channels"
        if channels % config.share:
            return f"its {channels} {what} cannot be shared by {config.share}; share must divide {channels}"
        return None

    @classmethod
    def _head_dim(cls, config) -> int | None:
        return config.head_dim if cls.rotary and config.rope_tied else None

    @classmethod
    def new_parameters(cls, config, shape: WeightShape) -> tuple[Tensor, ...]:
        width = cls.width(shape.m, shape.n) // config.share
        a = torch.zeros(width // 2 if cls._head_dim(config) else width, dtype=torch.float32)
        if config.penalty != "taylor":
            return (a,)
        return a, torch.zeros_like(a), torch.zeros(1, dtype=torch.float32)

    @classmethod
    def channels(cls, config, a: Tensor) -> Tensor:
        """The map less one, an entry a channel."""
        return spread(a, config.share, cls._head_dim(config))

    def update_layer(self, adapter_name, config, inference_mode: bool = False) -> None:
        # PEFT's own way to say that they are saved with the adapter and not trained.
        frozen = self.parameter_names(config)[1:]
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        super().update_layer(adapter_name, config, inference_mode)

    def keep_reference(self, adapter_name: str) -> None:
        """From now on the penalty pulls toward the present map."""
        self.reference[adapter_name] = self.dcft_a[adapter_name].detach().clone()

    def scale(self, adapter_names: list[str]) -> Tensor:
        """The map of these adapters together, float32, an entry a channel; differentiable."""
        total = 1
        for name in adapter_names:
            a = self.dcft_a[name]
            if name == self.watched and torch.is_grad_enabled() and a.requires_grad:
                a = a.view_as(a)  # the loss reaches the parameter through this view, a penalty does not
                a.register_hook(self._add_gradient)
            total = total + self.channels(self.adapter_options[name], a)
        return total

    def _add_gradient(self, gradient: Tensor) -> None:
        gradient = gradient.detach()
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x.to(torch.get_autocast_dtype(device)))

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        return scale_columns(self.product(x), self.scale(active))

    def product(self, x: Tensor) -> Tensor:
        """The base layer's output; a bias wider than x is rounded to it, as the values are."""
        base = self.base_layer
        if base.bias is None or base.bias.dtype == x.dtype:
            return base(x)
        shape = base.pattern, self.out_features, self.in_features
        return ops.linear(x, base.values, base.metadata, base.bias.to(x.dtype), *shape)


class RowScale(Scale):
    """y = (x W^T + b) diag(m): rows of the weight, and the bias with them."""

    @classmethod
    def update(cls, config, rows: Rows, a: Tensor, *_: Tensor) -> Tensor:
        scale = cls.channels(config, a)[rows.start : rows.stop, None]
        return rows.values * rows.kept(scale.expand(-1, rows.n))

    @classmethod
    def dense_change(cls, config, name: str, tensor: Tensor, a: Tensor, *_: Tensor) -> Tensor:
        return tensor.double() * (1 + cls.channels(config, a.double())) if name == "bias" else tensor

    def merged_tensors(self, adapter_names: list[str]) -> dict[str, Tensor]:
        return super().merged_tensors(adapter_names) | self._scaled(("bias",), adapter_names)

    @torch.no_grad()
    def _scaled(self, names: tuple[str, ...], adapter_names: list[str]) -> dict[str, Tensor]:
        """Dense tensors of the base layer, scaled by channel in float64 and rounded once."""
        options, found = self.adapter_options, {}
        scale = 1 + sum(self.channels(options[name], self.dcft_a[name].double()) for name in adapter_names)
        for name in names:
            tensor = getattr(self.base_layer, name, None)
            if tensor is not None:
                before = self._unmerged.get(name, tensor.data).to(tensor.device)
                found[name] = (before.double() * scale).to(before.dtype)
        return found


class ColumnScale(Scale):
    """y = (x diag(m)) W^T + b: columns of the weight."""

    @classmethod
    def width(cls, m: int, n: int) -> int:
        return n

    @classmethod
    def update(cls, config, rows: Rows, a: Tensor, *_: Tensor) -> Tensor:
        return rows.values * rows.kept(cls.channels(config, a).expand(rows.stop - rows.start, -1))

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        return self.product(scale_columns(x, self.scale(active)))


class QueryKeyRows(RowScale):
    """Rows of the query or key projection, before the rotary embedding."""

    rotary = True


class QueryKeyNorm(RowScale):
    """The weight of a norm over the channels of a head (Qwen3): it would undo a scale of the rows before it."""

    rotary = True
    adapts_vectors = True

    @property
    def device(self) -> torch.device:
        return self.base_layer.weight.device

    @property
    def shape(self) -> WeightShape:
        return WeightShape.vector(self.base_layer.weight.numel())

    def forward(self, x: Tensor) -> Tensor:
        return AdapterLayer.forward(self, x)  # autocast casts nothing for a norm

    def product(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    @classmethod
    def dense_change(cls, config, name: str, tensor: Tensor, a: Tensor, *_: Tensor) -> Tensor:
        return tensor.double() * (1 + cls.channels(config, a.double())) if name in ("weight", "bias") else tensor

    def merged_tensors(self, adapter_names: list[str]) -> dict[str, Tensor]:
        return self._scaled(("weight", "bias"), adapter_names)
