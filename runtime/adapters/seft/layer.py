"""The SEFT adapters of one compressed layer: its deltas, and a base layer whose mask follows them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_rt.adapters.base import AdapterLayer
from sparse_rt.adapters.effective import Fused, Rows, Update, Weight, WeightShape
from sparse_rt.adapters.seft import support
from sparse_rt.adapters.seft.config import SEFTConfig
from sparse_rt.adapters.seft.rules import Change
from sparse_rt.adapters.seft.support import Evolution
from sparse_rt.adapters.seft.window import Window
from sparse_rt.errors import UserError
from sparse_rt.kernels import positions as gradients

UNSET = -1  # int32: no position


class SEFTLayer(AdapterLayer):
    """delta float32 [K], trained; positions int32 [K], ascending; removed int32 [K], filled with -1 (or [0]).

    While an adapter that moves the mask is active and not disabled, the base layer's compressed tensors are those of
    the evolved weight, with 0 where something has grown; ``_evolution`` is what it takes to undo that. Whoever reads
    the base layer in between (``state_dict``) sees the evolved weight, in canonical form as ever.
    """

    adapter_layer_names = ("seft_delta",)
    frozen_names: ClassVar[tuple[str, ...]] = ("seft_positions", "seft_removed")
    other_param_names = ("adapter_options", *frozen_names)

    def __init__(self, base_layer, adapter_name: str, config: SEFTConfig):
        self._state: _State | None = None
        self._chosen: dict[str, _Chosen] = {}
        self.window: Window | None = None
        super().__init__(base_layer, adapter_name, config)

    @classmethod
    def refuse(cls, config: SEFTConfig, m: int, n: int) -> str | None:
        return f"it has {m} x {n} elements, positions are int32 and reach 2^31" if m * n >= 2**31 else None

    @classmethod
    def refuse_pattern(cls, config: SEFTConfig, pattern: str) -> str | None:
        return config.refuse(pattern)

    @classmethod
    def moves_mask(cls, config: SEFTConfig, pattern: str) -> bool:
        return config.moves_mask(pattern)

    @classmethod
    def parameter_names(cls, config: SEFTConfig) -> tuple[str, ...]:
        return (*cls.adapter_layer_names, *cls.frozen_names)

    @classmethod
    def new_parameters(cls, config: SEFTConfig, shape: WeightShape) -> tuple[Tensor, Tensor, Tensor]:
        count = config.deltas(shape)
        removed = count if config.moves_mask(shape.pattern) else 0
        unset = [torch.full((size,), UNSET, dtype=torch.int32) for size in (count, removed)]
        return torch.zeros(count, dtype=torch.float32), *unset

    def update_layer(self, adapter_name: str, config: SEFTConfig, inference_mode: bool = False) -> None:
        """Add an adapter; its positions are drawn from the kept ones with torch's generator."""
        others = {**self.adapter_options, adapter_name: config}
        moving = [name for name, options in others.items() if options.moves_mask(self.base_layer.pattern)]
        if moving and len(others) > 1:
            raise UserError(
                f"adapter {moving[0]!r} moves the mask, so it must be the only one of its layers, and there is "
                f"{', '.join(repr(name) for name in others if name != moving[0])}; use mode survivors for several"
            )
        super().update_layer(adapter_name, config, inference_mode)
        positions = self.seft_positions[adapter_name]
        if not positions.is_meta and not self.base_layer.values.is_meta:
            weight = super().compressed()
            drawn = torch.randperm(weight.values.numel(), dtype=torch.int32)[: positions.numel()].sort().values
            positions.copy_(support.positions_at(weight, drawn.to(positions.device)))
        self.settle()

    @classmethod
    def apply_to(cls, config: SEFTConfig, weight: Weight, parameters: tuple[Tensor, ...]) -> tuple[Weight, Update]:
        delta, positions, removed = parameters
        weight, _ = _evolved(weight, positions, removed)
        return weight, _update(delta, _slots(weight, positions))

    # What the base layer holds

    @property
    def evolution(self) -> Evolution:
        """How the base layer's mask differs from the one it was loaded with, right now."""
        if self._state is None:
            return Evolution.none(self.base_layer.values)
        return self._state.evolution.to(self.base_layer.values.device)

    @torch.compiler.disable
    def settle(self) -> None:
        """Give the base layer the mask of the active adapter, or its own where that is none."""
        if self.merged or self.base_layer.values.is_meta:
            return
        pattern, known = self.base_layer.pattern, [] if self.disable_adapters else self.active_adapters
        known = [name for name in known if name in self.adapter_options]
        active = [name for name in known if self.adapter_options[name].moves_mask(pattern)]
        if not active:
            self.restore()
        elif not self.seft_positions[active[0]].is_meta:
            tag = self._tag(active[0])
            if self._state is None or self._state.tag != tag:
                self.restore()
                weight, evolution = _evolved(super().compressed(), *tag.tensors)
                self._hold(weight, evolution, tag)

    def restore(self) -> None:
        """Give the base layer its own mask and values back, bit for bit."""
        if self._state is not None:
            none = Evolution.none(self.base_layer.values)
            weight, _ = _rewritten(super().compressed(), self.evolution, none.removed, none.grown)
            self._hold(weight, None, None)

    @torch.no_grad()
    def evolve_to(self, adapter_name: str, change: Change) -> Tensor:
        """Move deltas and mask; returns int64 [K]: the slot each delta was in before, -1 for new ones (which are 0).

        Slots that nothing takes go to the lowest kept positions without a delta, where a delta of 0 changes nothing.
        """
        delta, positions = self.seft_delta[adapter_name], self.seft_positions[adapter_name]
        stored = self.seft_removed[adapter_name]
        weight, evolution = _rewritten(super().compressed(), self.evolution, change.removed, change.grown)
        stay, count = change.stays.nonzero().squeeze(-1), positions.numel()
        taken = torch.cat([positions[stay], change.new.to(torch.int32)])
        missing = count - taken.numel()
        first = torch.arange(min(count + missing, weight.values.numel()) if missing else 0, device=positions.device)
        spare = support.without(support.positions_at(weight, first), taken.sort().values)[:missing]
        moved = torch.cat([taken, spare])
        order = moved.argsort()
        source = torch.full((count,), -1, dtype=torch.int64, device=positions.device)
        source[: stay.numel()] = stay
        source = source[order]
        delta.copy_(torch.where(source < 0, 0.0, delta[source]))
        positions.copy_(moved[order])
        if stored.numel():
            stored.fill_(UNSET)[: change.removed.numel()] = change.removed
        self._hold(weight, evolution, self._tag(adapter_name))
        return source

    def _hold(self, weight: Weight, evolution: Evolution | None, tag: _Tag | None) -> None:
        base = self.base_layer
        if weight.values is not base.values:
            base.weight_values.data, base.metadata.data = weight.values, weight.metadata
        self._blocks, self._chosen = weight.blocks, {}
        self._state = None if evolution is None else _State(evolution, tag)

    def _tag(self, adapter_name: str) -> _Tag:
        return _Tag((self.seft_positions[adapter_name], self.seft_removed[adapter_name]))

    # What changes which adapter is in force

    def compressed(self) -> Weight:
        self.settle()
        return super().compressed()

    def forward(self, x: Tensor) -> Tensor:
        self.settle()
        return super().forward(x)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()
        self.settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.settle()

    # The map on the values

    @torch.compiler.disable
    def slots_of(self, adapter_name: str) -> _Chosen:
        """Where the deltas are among the base layer's values, found once for as long as nothing moves."""
        tag = self._tag(adapter_name)
        held = self._chosen.get(adapter_name)
        if held is None or held.tag != tag:
            weight, positions = super().compressed(), tag.tensors[0].detach()
            chosen = gradients.Chosen(positions, weight.pattern, weight.m, weight.n)
            held = self._chosen[adapter_name] = _Chosen(tag, _slots(weight, positions), chosen)
        return held

    def updates(self, adapter_names: list[str]) -> list[Update]:
        self.settle()
        return [
            _update(self.seft_delta[name], self.slots_of(name).slots, functools.partial(self._gradients, name))
            for name in adapter_names
            if name in self.adapter_options
        ]

    def _gradients(self, name: str, weight: Weight, dy: Tensor, x: Tensor, delta: Tensor, slots: Tensor):
        """Of the deltas: K floats; what a window wants to know of the gradient goes there on the way."""
        chosen = self.slots_of(name).chosen
        if self.window is None:
            return gradients.gradient(dy, x, chosen), None
        values = functools.partial(values_between, weight, delta, slots)
        return self.window.observe(dy, x, weight, chosen.positions, delta.numel(), values), None


class _Tag:
    """Says whether positions are still the same: the same tensors, not written to since, on the same device."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.tensors = tensors
        self.versions = tuple((0 if t.is_inference() else t._version, t.device) for t in tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tag) or self.versions != other.versions:
            return False
        return all(one is two for one, two in zip(self.tensors, other.tensors, strict=True))

    __hash__ = None


@dataclass(frozen=True)
class _State:
    evolution: Evolution
    tag: _Tag


@dataclass(frozen=True)
class _Chosen:
    tag: _Tag
    slots: Tensor
    chosen: gradients.Chosen


def _evolved(weight: Weight, positions: Tensor, removed: Tensor) -> tuple[Weight, Evolution]:
    """The weight of a model whose mask is that of its checkpoint, evolved as an adapter says."""
    positions, removed = positions.detach(), removed.detach()
    if positions.numel() == 0 or int(positions[0]) < 0:
        return weight, Evolution.none(weight.values)  # not loaded yet
    removed = removed[removed >= 0]
    _, kept = support.slots(weight, positions)
    grown = positions[~kept | support.contains(removed, positions)]
    return _rewritten(weight, Evolution.none(weight.values), removed, grown)


def _rewritten(weight: Weight, now: Evolution, removed: Tensor, grown: Tensor) -> tuple[Weight, Evolution]:
    if torch.equal(now.removed, removed) and torch.equal(now.grown, grown):
        return weight, now
    values, metadata, evolution = support.rewrite(weight, now, removed, grown)
    return Weight.of(values, metadata, weight.pattern, weight.m, weight.n), evolution


def _slots(weight: Weight, positions: Tensor) -> Tensor:
    index, kept = support.slots(weight, positions)
    if not bool(kept.all()):
        raise UserError("the adapter has deltas where the weight keeps nothing; it belongs to another model")
    return index


def _update(delta: Tensor, slots: Tensor, of_deltas=None) -> Update:
    return Update(_scattered, (delta, slots), Fused(lambda *_: None, _apply, of_deltas))


def _scattered(rows: Rows, delta: Tensor, slots: Tensor) -> Tensor:
    """The deltas of one block in the shape of its values."""
    limits = torch.tensor([rows.begin, rows.begin + rows.values.numel()], dtype=slots.dtype, device=slots.device)
    begin, end = torch.searchsorted(slots, limits).tolist()
    change = torch.zeros(rows.values.numel(), dtype=delta.dtype, device=delta.device)
    return change.scatter(0, slots[begin:end].long() - rows.begin, delta[begin:end]).view(rows.values.shape)


def _apply(weight: Weight, out: Tensor, with_base: bool, delta: Tensor, slots: Tensor) -> None:
    """A copy of the values with K of them changed, each rounded once."""
    flat, values, at = out.view(-1), weight.values.detach().flatten(), slots.long()
    if with_base:
        flat.copy_(values)
        flat[at] = (values[at].float() + delta.detach()).to(out.dtype)
    else:
        flat.zero_()
        flat[at] = delta.detach().to(out.dtype)


def values_between(weight: Weight, delta: Tensor, slots: Tensor, begin: int, end: int) -> Tensor:
    """float32 [end - begin]: that part of the flattened values with the deltas added."""
    limits = torch.tensor([begin, end], dtype=slots.dtype, device=slots.device)
    first, last = torch.searchsorted(slots, limits).tolist()
    values = weight.values.detach().flatten()[begin:end].float()
    return values.index_add(0, slots[first:last].long() - begin, delta.detach()[first:last].float())
