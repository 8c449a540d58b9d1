"""The highest scores of every row, exactly as many as asked for, in bounded memory.

Scores are looked at in pieces of ``PIECE`` elements: what a selection takes besides its mask does not grow with the
weight, and stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 17
# Rows up to this size (the groups of N:M) are ranked by comparing all pairs: to select in each has a price of its own.
PAIRED = 16


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``width`` elements, of about ``PIECE`` elements each, one row at least."""
    step = max(1, PIECE // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def keep_highest(scores: Tensor, keep: int) -> Tensor:
    """bool mask over the last dimension with exactly ``keep`` True per row; of equal scores the lower index wins."""
    size = scores.shape[-1]
    if keep == 0 or keep == size:
        return torch.full(scores.shape, keep == size, dtype=torch.bool, device=scores.device)
    rows = scores.reshape(-1, size)
    if len(rows) == 1 and size > PIECE:
        return _of_long_row(rows[0], keep).view(scores.shape)
    select = _of_groups if size <= PAIRED else _of_rows
    mask = torch.empty(rows.shape, dtype=torch.bool, device=scores.device)
    for part in pieces(*rows.shape):
        mask[part] = select(rows[part], keep)
    return mask.view(scores.shape)


def _of_groups(rows: Tensor, keep: int) -> Tensor:
    """A score stays when fewer than ``keep`` others beat it: a higher one, or an equal one before it."""
    columns = rows.T.contiguous()
    beaten = torch.zeros(columns.shape, dtype=torch.uint8, device=rows.device)
    for later in range(1, len(columns)):
        for earlier in range(later):
            wins = columns[earlier] >= columns[later]
            beaten[later] += wins
            beaten[earlier] += ~wins
    return (beaten < keep).T


def _of_rows(rows: Tensor, keep: int) -> Tensor:
    threshold = rows.kthvalue(rows.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    mask = rows > threshold
    missing = keep - mask.sum(-1, keepdim=True, dtype=torch.int32)
    ties = rows == threshold
    return mask | (ties & (ties.cumsum(-1, dtype=torch.int32) <= missing))


def _of_long_row(scores: Tensor, keep: int) -> Tensor:
    """``_of_rows`` of one row that is larger than a piece: a whole weight."""
    threshold = _kth_highest(scores, keep)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    missing = keep - sum(int((scores[part] > threshold).sum()) for part in pieces(len(scores), 1))
    for part in pieces(len(scores), 1):
        mask[part] = scores[part] > threshold
        if missing:
            ties = scores[part] == threshold
            ties &= ties.cumsum(0, dtype=torch.int32) <= missing
            mask[part] |= ties
            missing -= int(ties.sum())
    return mask


def _kth_highest(scores: Tensor, keep: int) -> Tensor:
    """The ``keep``-th highest of ``scores`` [k]; counted by its upper and then its lower 16 bits when float32.

    Integers in the order of the floats: those of a negative float have all bits but the sign flipped.
    """
    if scores.dtype != torch.float32:
        return scores.kthvalue(len(scores) - keep + 1).values

    def counts(upper: int | None) -> Tensor:
        found = torch.zeros(1 << 16, dtype=torch.int64, device=scores.device)
        for part in pieces(len(scores), 1):
            bits = (scores[part] + 0.0).view(torch.int32)  # -0.0 and 0.0 are equal
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            digits = (ordered >> 16) + (1 << 15) if upper is None else ordered[(ordered >> 16) == upper] & 0xFFFF
            found += torch.bincount(digits, minlength=1 << 16)
        return found

    def digit_of(found: Tensor, rank: int) -> tuple[int, int]:
        """Digit of the ``rank``-th highest, and its rank among the equal ones."""
        above = found.flip(0).cumsum(0)
        index = int(torch.searchsorted(above, rank))
        return len(found) - 1 - index, rank - (int(above[index - 1]) if index else 0)

    upper, rank = digit_of(counts(None), keep)
    upper -= 1 << 15
    ordered = (upper << 16) | digit_of(counts(upper), rank)[0]
    bits = torch.tensor(ordered, dtype=torch.int32, device=scores.device)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
