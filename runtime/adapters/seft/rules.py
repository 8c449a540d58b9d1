"""Which positions a weight's deltas move to: pure functions of the deltas and of the gradients of one window.

All positions are flat and ascending, and ties go to the lower one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.adapters.seft.support import contains, union, without
from sparse_rt.formats.selection import keep_highest


@dataclass(frozen=True)
class Deltas:
    """The state before an evolution: K deltas, and what of the mask has moved (see ``support.Evolution``)."""

    positions: Tensor
    delta: Tensor
    removed: Tensor
    grown: Tensor


@dataclass(frozen=True)
class Candidates:
    """What a window found: positions, their accumulated signed gradients and what they may be used for.

    ``kept`` says which are kept now, ``weight`` holds the present value of those (base value + delta).
    """

    positions: Tensor
    total: Tensor
    kept: Tensor
    weight: Tensor
    grow: Tensor  # bool: candidates of growth
    prune: Tensor  # bool: candidates of Adapt


@dataclass(frozen=True)
class Change:
    """The state after it. ``stays``: bool [K], the slots that keep position, delta and optimizer state.

    ``new``: positions that the other slots take, fewer than those where there were not enough candidates.
    """

    stays: Tensor
    new: Tensor
    removed: Tensor
    grown: Tensor


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool: exactly ``count`` of the lowest scores (all when there are not so many)."""
    return keep_highest(-scores, min(count, scores.numel()))


def highest(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """bool: the ``count`` highest scores above 0 among the allowed ones."""
    scores = torch.where(allowed, scores, 0)
    return keep_highest(scores, min(count, scores.numel())) & (scores > 0)


def adapt(deltas: Deltas, candidates: Candidates, excess: int) -> Change:
    """Remove the ``excess`` kept weights with the smallest |weight * accumulated gradient|; their slots are free."""
    chosen = candidates.prune
    sensitivity = (candidates.weight * candidates.total).abs()[chosen]
    return prune(deltas, candidates.positions[chosen][lowest(sensitivity, excess)])


def prune(deltas: Deltas, out: Tensor) -> Change:
    """Remove the kept weights ``out``: grown ones leave, those of the base are marked as removed."""
    grown = without(deltas.grown, out)
    removed = union(deltas.removed, without(out, deltas.grown))
    return Change(~contains(out, deltas.positions), deltas.positions[:0], removed, grown)


def drop(deltas: Deltas, allowed: Tensor, count: int) -> Tensor:
    """bool [K]: the ``count`` smallest |delta| of the allowed slots."""
    size = torch.where(allowed, deltas.delta.abs(), torch.inf)
    return lowest(size, min(count, int(allowed.sum()))) & allowed


def evolve(deltas: Deltas, candidates: Candidates, excess: int, count: int) -> Change:
    """Adapt, Drop, Grow: ``excess`` kept weights go, ``count`` deltas and those of removed weights move.

    Of the new positions at least as many are pruned ones as grown positions were dropped, so that no fewer weights are
    kept than before the last growth; where there are too few candidates for that, the largest of the dropped stay. A
    position that is dropped and grown stays as it is.
    """
    adapted = adapt(deltas, candidates, excess)
    alive = adapted.stays
    dropped = drop(deltas, alive, count)
    lost = dropped & contains(adapted.grown, deltas.positions)
    of_base = candidates.kept & ~contains(deltas.grown, candidates.positions)
    of_base &= ~contains(adapted.removed, candidates.positions)
    size = candidates.total.abs()
    free = candidates.grow & ~contains(deltas.positions[alive & ~dropped], candidates.positions)
    first = highest(size, free & ~of_base, int(lost.sum()))
    missing = int(lost.sum()) - int(first.sum())
    undropped = _largest_dropped(deltas, lost, candidates.positions[first], missing)
    wanted = int(dropped.sum()) + int((~alive).sum()) - int(first.sum()) - missing
    grow = first | highest(size, free & ~first & ~contains(deltas.positions[undropped], candidates.positions), wanted)
    left = int(dropped.sum()) + int((~alive).sum()) - int(grow.sum()) - missing
    undropped = undropped | _largest_dropped(deltas, dropped & ~undropped, candidates.positions[grow], left)
    stays = alive & (~dropped | undropped | contains(candidates.positions[grow], deltas.positions))
    new = without(candidates.positions[grow], deltas.positions[stays])
    held = union(deltas.positions[stays], new)
    grown = union(adapted.grown, candidates.positions[grow & ~of_base])
    return Change(stays, new, adapted.removed, grown[contains(held, grown)])


def _largest_dropped(deltas: Deltas, dropped: Tensor, grown: Tensor, count: int) -> Tensor:
    """bool [K]: ``count`` dropped slots with the largest |delta| that are not grown again anyway."""
    open_ = dropped & ~contains(grown, deltas.positions)
    size = torch.where(open_, deltas.delta.abs(), -1.0)
    return keep_highest(size, min(max(count, 0), size.numel())) & open_


@dataclass(frozen=True)
class Pairs:
    """Possible swaps, at most one a group of N:M: the kept position ``out`` for the pruned position ``into``.

    Indexes into ``Candidates``, ascending by group.
    """

    out: Tensor
    into: Tensor


def swap(
    deltas: Deltas,
    candidates: Candidates,
    pairs: Pairs,
    originals: Tensor,
    group: int,
    step_size: float,
    count: int,
    swaps: int,
    fresh: Tensor,
) -> Change:
    """Evolution within N:M groups (ours): Drop, Swap, Grow; every group keeps its number of weights at every moment.

    Drop   ``count`` smallest |delta|. A dropped position that had been swapped in takes its swap back: of the weights
           removed from its group the largest returns (``originals``: their values).
    Swap   a pruned position comes in for a kept one where the first-order gain of moving it is larger than the
           first-order cost of removing the other, step_size * g_in^2 > |w_out * g_out| with g the accumulated gradient;
           best ratio first, at most ``swaps``, as many as there are free slots. ``fresh`` slots (bool [K]: swapped in
           by the last evolution) neither go out nor are dropped.
    Grow   the other free slots go to the kept positions with the largest |g|.
    """
    dropped = drop(deltas, ~fresh, count)
    lost = dropped & contains(deltas.grown, deltas.positions)
    back = _taken_back(deltas, lost, originals, group)
    removed, grown = without(deltas.removed, back), without(deltas.grown, deltas.positions[lost])
    chosen = _best_swaps(deltas, candidates, pairs, group, step_size, swaps, dropped, lost, fresh)
    out, into = candidates.positions[pairs.out[chosen]], candidates.positions[pairs.into[chosen]]
    out = out.sort().values
    removed, grown = union(removed, without(out, grown)), union(without(grown, out), into)
    gone = contains(out, deltas.positions)
    alive = ~gone & ~lost
    dropped = dropped & alive
    free = candidates.grow & candidates.kept & ~contains(deltas.positions[alive & ~dropped], candidates.positions)
    free &= ~contains(out, candidates.positions) & ~contains(deltas.positions[lost], candidates.positions)
    wanted = deltas.positions.numel() - int((alive & ~dropped).sum()) - into.numel()
    grow = highest(candidates.total.abs(), free, wanted)
    undropped = _largest_dropped(deltas, dropped, candidates.positions[grow], wanted - int(grow.sum()))
    stays = alive & (~dropped | undropped | contains(candidates.positions[grow], deltas.positions))
    new = union(without(candidates.positions[grow], deltas.positions[stays]), into)
    return Change(stays, new, removed, grown)


def _taken_back(deltas: Deltas, lost: Tensor, originals: Tensor, group: int) -> Tensor:
    """The removed positions that return: in each group as many as it loses of ``grown``, the largest originals."""
    if not bool(lost.any()):
        return deltas.removed[:0]
    open_ = ~contains(without(deltas.grown, deltas.positions[lost]), deltas.removed)
    removed, size = deltas.removed[open_], originals[open_].float().abs()
    by_size = torch.sort(size, descending=True, stable=True).indices
    order = by_size[torch.sort(removed[by_size] // group, stable=True).indices]
    groups = removed[order] // group
    rank = torch.arange(groups.numel(), device=groups.device) - torch.searchsorted(groups, groups)
    losing = deltas.positions[lost] // group
    losses = torch.searchsorted(losing, groups, right=True) - torch.searchsorted(losing, groups)
    return removed[order[rank < losses]].sort().values


def _best_swaps(
    deltas: Deltas,
    candidates: Candidates,
    pairs: Pairs,
    group: int,
    step_size: float,
    swaps: int,
    dropped: Tensor,
    lost: Tensor,
    fresh: Tensor,
) -> Tensor:
    """Indexes into ``pairs`` of the swaps that are made."""
    out = candidates.positions[pairs.out]
    gain = step_size * candidates.total[pairs.into].square()
    cost = (candidates.weight[pairs.out] * candidates.total[pairs.out]).abs()
    allowed = (gain > cost) & ~contains(deltas.positions[fresh], out)
    allowed &= ~contains(deltas.positions[lost] // group, out // group)
    ratio = torch.where(allowed, gain / cost, -1.0)  # inf where removing costs nothing
    order = torch.sort(ratio, descending=True, stable=True).indices
    order = order[: int(allowed.sum())][:swaps]
    # A swap takes a slot, unless it frees one: that of the position that goes out.
    frees = contains(deltas.positions[~dropped], out[order])
    needed = torch.cumsum((~frees).int(), 0)
    return order[needed <= int(dropped.sum())].sort().values
