"""``--pattern auto``: the pattern that the zeros of a pruned weight obey, found weight by weight as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rt.errors import UserError

AUTO = "auto"
# Group sizes M whose N:M is looked for: those of published N:M checkpoints.
GROUPS = (4, 8, 16, 32)
# With --method none a weight denser than this stays dense: at 0.85 bfloat16 saves under 9% of the bytes and a sparse
# kernel has nothing to skip.
MAX_DENSITY = 0.85
# N:M stores N values a group, zeros where a group has fewer. Below this share of true nonzeros an unstructured bitmask
# of the same weight is the smaller and the faster form, and obeying N:M says nothing: nearly empty weights all do.
MIN_FILLED = 0.5
_ROWS = 128  # looked at together: small enough for a cache, divisible by four


@dataclass(frozen=True)
class Detected:
    """What the zeros of a weight say. ``pattern`` is None for one that stays dense, ``reason`` then says why.

    ``transposed`` is an N:M that holds down the columns (groups of M rows), where no format can use it.
    """

    pattern: str | None
    nnz: int
    reason: str | None = None
    transposed: str | None = None


def detect(kept: Tensor) -> Detected:
    """The pattern of a weight from its nonzeros (or stored mask): bool [m, n].

    The tightest N:M with M in ``GROUPS`` wins, of equal densities the one with the smallest M: exact 2:4 is 4:8 and
    8:16, too. N:M counts as meant when at least half of the groups that are not empty hold exactly N; 2:4 counts
    whenever no group holds more than two, for weights are pruned further inside it. Otherwise ``unstructured`` up to
    ``MAX_DENSITY``.
    """
    kept = kept.contiguous()
    nnz, numel = int(torch.count_nonzero(kept)), kept.numel()
    if nnz == numel:
        return Detected(None, nnz, "it has no zeros: the weight is not pruned")
    density = nnz / numel
    found = _tightest(kept, _along_rows, density)
    if found:
        return Detected(found, nnz)
    if density > MAX_DENSITY:
        return Detected(None, nnz, f"density {density:.4f} is above {MAX_DENSITY}: compressing saves next to nothing")
    return Detected("unstructured", nnz, transposed=_tightest(kept, _down_columns, density))


def _along_rows(kept: Tensor, group: int) -> Tensor | None:
    """How many of every ``group`` consecutive columns are kept: int32 [m, n / group]; None when they do not divide."""
    n = kept.shape[1]
    if n % group:
        return None
    # Four bools are the four bytes of an int32, and their sum lands in its lowest byte: ten times the speed of a sum.
    pairs = kept.view(torch.int32)
    pairs = pairs + (pairs >> 8)
    counts = (pairs + (pairs >> 16)) & 255
    while counts.shape[1] * group > n:
        counts = counts[:, 0::2] + counts[:, 1::2]
    return counts


def _down_columns(kept: Tensor, group: int) -> Tensor | None:
    """How many of every four consecutive rows are kept: uint8 [m / 4, n]; None for other groups and odd row counts."""
    if group != 4 or kept.shape[0] % 4:
        return None
    rows = [kept[start::4].view(torch.uint8) for start in range(4)]
    return (rows[0] + rows[1]) + (rows[2] + rows[3])


def _tightest(kept: Tensor, count: Callable[[Tensor, int], Tensor | None], density: float) -> str | None:
    """The tightest N:M that the groups obey and were meant to, or None."""
    best, name = 1.0, None
    for group in GROUPS:
        most = full = used = 0
        for rows in kept.split(_ROWS):
            counts = count(rows, group)
            share = 1.0 if counts is None else max(most, int(counts.max())) / group
            # The share can only grow from here: most weights are done with after their first rows.
            if share >= best or share > MAX_DENSITY or density < MIN_FILLED * share:
                break
            highest = int(counts.max())
            full = full * (highest <= most) + int(torch.count_nonzero(counts == highest)) * (highest >= most)
            used += int(torch.count_nonzero(counts))
            most = max(most, highest)
        else:
            if most and (2 * full >= used or (most, group) == (2, 4)):
                best, name = most / group, f"{most}:{group}"
    return name


def kept_positions(source: Any, key: str) -> Tensor:
    """bool [m, n]: the mask that the ``Source`` stores for weight ``key``, else where it is not zero (-0.0 is)."""
    stored = source.stored_mask(key)
    return source.load(key) != 0 if stored is None else stored


def refuse_unpruned(source: Any, decisions: Iterable[Any]) -> None:
    """``UserError`` when the zeros of no weight are worth compressing; stops reading at the first whose zeros are.

    Runs before anything is written. An N:M pattern that was asked for is checked where it is applied instead.
    """
    waiting = [d for d in decisions if d.pattern is not None]
    if any(d.pattern not in (AUTO, "unstructured") for d in waiting):
        return
    lowest: tuple[float, str] | None = None
    for decision in waiting:
        found = detect(kept_positions(source, decision.key))
        if found.pattern:
            return
        density = found.nnz / torch.Size(decision.shape).numel()
        if lowest is None or density < lowest[0]:
            lowest = density, decision.name
    if lowest:
        raise UserError(
            f"nothing to compress in {source.model}: it is not pruned, the fewest nonzeros has {lowest[1]} with a "
            f"density of {lowest[0]:.4f}, and {MAX_DENSITY} is allowed; prune it, for example with --method magnitude"
        )


def most_common(patterns: Iterable[str]) -> str:
    """The pattern of most weights, of equally many the one seen first; "unstructured" when there is none yet."""
    counts = Counter(pattern for pattern in patterns if pattern != AUTO)
    return counts.most_common(1)[0][0] if counts else "unstructured"


def transposed_note(found: dict[str, str]) -> list[str]:
    """What to say of weights (name -> N:M) whose groups run down their columns."""
    if not found:
        return []
    name, pattern = next(iter(found.items()))
    return [
        f"{len(found)} weights, {name} for one, obey {pattern} down their columns (groups of consecutive rows), not "
        "along their rows as every N:M kernel needs: stored as unstructured. Masks chosen on transposed weights look "
        "like this"
    ]
