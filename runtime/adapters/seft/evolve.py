"""Evolution during a training run: a Trainer callback that opens windows and moves positions at their end.

    step  ... k-4 k-3 k-2 k-1  k | k+1 ...             ... T-4 T-3 T-2 T-1  T
               [--- window ---]  Adapt, Drop, Grow          [--- window ---]  Adapt

An evolution that would lie in the last window is left out. What a window holds is part of the optimizer's state, so a
checkpoint in its middle goes on to the bit.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from sparse_rt.adapters.seft import rules, support
from sparse_rt.adapters.seft.config import SEFTConfig
from sparse_rt.adapters.seft.layer import SEFTLayer, values_between
from sparse_rt.adapters.seft.optimizer import SparseAdamW, since
from sparse_rt.adapters.seft.rules import Candidates, Change, Deltas, Pairs
from sparse_rt.adapters.seft.window import Window
from sparse_rt.formats import get_format

logger = logging.getLogger(__name__)


class Evolve(TrainerCallback):
    """Moves the deltas ``adapter`` of ``layers`` (by name) and their state in ``optimizer``."""

    def __init__(self, layers: dict[str, SEFTLayer], adapter: str, config: SEFTConfig, optimizer: SparseAdamW):
        self.layers, self.adapter, self.config, self.optimizer = layers, adapter, config, optimizer
        self.moved = 0  # deltas, in this process

    # When

    def in_window(self, step: int, steps: int) -> bool:
        """Whether the gradients of optimizer step ``step`` (from 1) of ``steps`` count."""
        next_evolution = -(-step // self.config.interval) * self.config.interval
        return step > steps - self.config.window or (
            self.evolves(next_evolution, steps) and step > next_evolution - self.config.window
        )

    def evolves(self, step: int, steps: int) -> bool:
        return step > 0 and step % self.config.interval == 0 and step <= steps - self.config.window

    def on_step_begin(self, args, state, control, **kwargs):
        if self.in_window(state.global_step + 1, state.max_steps):
            for layer in self.layers.values():
                if layer.window is None:
                    layer.window = Window(self._mode(layer))

    def on_substep_end(self, args, state, control, **kwargs):
        for layer in self._open():
            share(layer.window, layer.device)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for layer in self._open():
            share(layer.window, layer.device)
            close_step(layer.window)

    def on_step_end(self, args, state, control, **kwargs):
        step, steps = state.global_step, state.max_steps
        if step >= steps:
            self.finish()
        elif self.evolves(step, steps):
            self.evolve(self.config.drop_share(step, steps))

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()  # a run that was stopped before its last step

    # What

    @torch.no_grad()
    def evolve(self, share_of_deltas: float) -> None:
        """Adapt, Drop, Grow (or Drop, Swap, Grow) in every layer whose gradient was seen."""
        for layer in self.layers.values():
            window, layer.window = layer.window, None
            if window is None or window.positions is None or window.steps == 0:
                continue
            deltas, candidates = self._deltas(layer), self._candidates(layer, window)
            count = int(share_of_deltas * deltas.positions.numel())
            if window.mode == "nm_swap":
                change = self._swap(layer, window, deltas, candidates, share_of_deltas, count)
            else:
                change = rules.evolve(deltas, candidates, layer.evolution.excess, count)
            self._move(layer, change, window)

    @torch.no_grad()
    def finish(self) -> None:
        """Prune every weight back to the number it had; without a window by magnitude, which is said."""
        for name, layer in self.layers.items():
            window, layer.window = layer.window, None
            excess = layer.evolution.excess
            if excess <= 0:
                continue
            if window is not None and window.positions is not None and window.steps and window.mode == "unstructured":
                change = rules.adapt(self._deltas(layer), self._candidates(layer, window), excess)
            else:
                logger.warning("%s is pruned back by magnitude: training ended without gradients to go by", name)
                change = rules.prune(self._deltas(layer), self._smallest(layer, excess))
            self._move(layer, change, None)

    def _swap(self, layer, window: Window, deltas: Deltas, candidates: Candidates, share_of_deltas, count) -> Change:
        group = get_format(layer.base_layer.pattern).group
        gradients = candidates.total[window.into]
        # The step of plain descent that moves a candidate of root-mean-square gradient as far as Adam does in an
        # interval: a learning rate a step. Sums over the window on both sides leave one of them on the left.
        scale = float(gradients.square().mean().sqrt()) if gradients.numel() else 0.0
        rate = float(self.optimizer.param_groups[0]["lr"])
        step_size = self.config.interval * rate / scale if scale > 0 else 0.0
        groups = layer.out_features * layer.in_features // group
        age = self.optimizer.state_of(layer.seft_delta[self.adapter])["age"]
        # A swap starts with the age of its window and is protected at the evolution after it.
        fresh = support.contains(deltas.grown, deltas.positions) & (age <= self.config.interval + self.config.window)
        pairs = Pairs(window.out.long(), window.into.long())
        swaps = int(share_of_deltas * groups)
        originals = layer.evolution.values
        return rules.swap(deltas, candidates, pairs, originals, group, step_size, count, swaps, fresh)

    def _mode(self, layer: SEFTLayer) -> str:
        return self.config.mode_of(layer.base_layer.pattern)

    def _deltas(self, layer: SEFTLayer) -> Deltas:
        evolution = layer.evolution
        delta, positions = layer.seft_delta[self.adapter].detach(), layer.seft_positions[self.adapter].detach()
        return Deltas(positions, delta, evolution.removed, evolution.grown)

    def _candidates(self, layer: SEFTLayer, window: Window) -> Candidates:
        weight, deltas = layer.compressed(), self._deltas(layer)
        index, kept = support.slots(weight, window.positions)
        value = torch.where(kept, weight.values.detach().flatten()[index.long()].float(), 0)
        at = torch.searchsorted(deltas.positions, window.positions).clamp_(max=deltas.positions.numel() - 1)
        value += torch.where(deltas.positions[at] == window.positions, deltas.delta[at], 0)
        return Candidates(window.positions, window.total, kept, value, window.grow, window.prune)

    def _smallest(self, layer: SEFTLayer, count: int) -> Tensor:
        weight = layer.compressed()
        slots = layer.slots_of(self.adapter).slots
        values = values_between(weight, layer.seft_delta[self.adapter], slots, 0, weight.values.numel())
        return support.positions_at(weight, rules.lowest(values.abs(), count).nonzero().squeeze(-1))

    def _move(self, layer: SEFTLayer, change: Change, window: Window | None) -> None:
        """Carry out ``change`` and take the optimizer's state along; new deltas get the state that they would have."""
        delta = layer.seft_delta[self.adapter]
        source = layer.evolve_to(self.adapter, change)
        delta.grad = None
        state = self.optimizer.state_of(delta)
        new = source < 0
        for held in state.values():
            held.copy_(torch.where(new, 0.0, held[source]))
        self.moved += int(new.sum())
        if window is not None:
            positions = layer.seft_positions[self.adapter]
            at = torch.searchsorted(window.positions, positions).clamp_(max=window.positions.numel() - 1)
            seeded = new & support.contains(change.new, positions)
            (beta1, beta2), steps = self.optimizer.param_groups[0]["betas"], window.steps
            state["exp_avg"][seeded] = window.total[at[seeded]] / steps * since(beta1, steps)
            state["exp_avg_sq"][seeded] = window.squares[at[seeded]] / steps * since(beta2, steps)
            state["age"][seeded] = float(steps)

    # A checkpoint

    def _open(self) -> list[SEFTLayer]:
        return [layer for layer in self.layers.values() if layer.window is not None]

    def state(self) -> dict[str, Any]:
        """The open windows, by layer; on several processes it is the same on all."""
        return {name: layer.window.state() for name, layer in self.layers.items() if layer.window is not None}

    def load(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.window = Window.of(state[name], layer.device) if name in state else None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(window: Window, device: torch.device) -> None:
    """After the first micro-batch: all processes take the candidates and the gradient of the first one.

    The mean over processes needs gradients at the same positions, which only the first has of this micro-batch.
    """
    if window.first is not None or window.steps or _processes() == 1:
        return
    seen = window.positions is not None
    sizes = torch.tensor([window.positions.numel(), window.out.numel()] if seen else [-1, 0], device=device)
    dist.broadcast(sizes, 0)
    count, pairs = sizes.tolist()
    if count < 0:  # the first process has not used this layer yet
        window.positions = None
        return
    if dist.get_rank() != 0:
        window.chosen = None
        window.positions, window.out, window.into = (
            torch.empty(size, dtype=torch.int32, device=device) for size in (count, pairs, pairs)
        )
        window.grow, window.prune = (torch.empty(count, dtype=torch.bool, device=device) for _ in range(2))
        window.reset()
    for tensor in (window.positions, window.out, window.into, window.grow, window.prune, window.micro):
        dist.broadcast(tensor.view(torch.uint8), 0)
    window.first = window.micro.clone()
    window.micro.zero_()


def close_step(window: Window) -> None:
    if window.positions is None:
        return
    gradient = window.micro
    if _processes() > 1:
        dist.all_reduce(gradient)
        gradient = gradient / _processes()
        if window.steps == 0:
            gradient += window.first
    window.close_step(gradient)
