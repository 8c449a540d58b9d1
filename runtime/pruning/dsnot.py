"""DSnoT, "Dynamic Sparse No Training" (Zhang et al., arXiv 2310.08915): other positions, no new values, no training.

The mean input of a layer makes every output row miss something: the expected error

    e_i = sum_j (W_ij - What_ij) s_j        with s_j the sum of input j over a sequence, averaged over the sequences.

Row by row a removed weight comes back and a kept one goes, at most ``CYCLES`` times, while |e_i| > ``THRESHOLD``:

- back comes the removed weight that lowers |e_i| most for its uncertainty: the largest W_ij s_j / var(x_j) of the sign
  of e_i (its variance within a sequence, averaged);
- unstructured: of the kept weights whose loss lowers |e_i| too, the one with the smallest Wanda score goes;
- N:M: of the same group, the one with the smallest Wanda score goes;
- a swap that would turn the sign of e_i, or not bring it nearer to zero, ends the row.

A position moves once at most. These are the rules of the published code with its option against turned signs; it
applies that to N:M always, to unstructured weights never unless asked to, and lets errors of N:M rows grow. (Perplexity
of the shipped model, 32 calibration sequences: Wanda at 60 % 32.15, then 60.41 by those rules and 32.77 by these;
magnitude at 60 % 38.22, then 86.76 and 37.93. Its rows are short, so 50 swaps are many.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.formats.selection import keep_highest
from sparse_rt.pruning.base import Repair, register_repair
from sparse_rt.pruning.statistics import ActivationStats

CYCLES = 50
THRESHOLD = 0.1
INFINITE = float("inf")


@register_repair
class DSnoT(Repair):
    """Keeps as many weights in every row, and in every group of N:M, as there were."""

    name = "dsnot"
    needs_moments = True
    keeps_columns = False

    def repair(
        self, dense: Tensor, weight: Tensor, mask: Tensor, stats: ActivationStats, fmt: Format
    ) -> tuple[Tensor, Tensor]:
        stats = self.calibrated(stats)
        moved = _Rows(dense, weight, mask, stats).swap(fmt.group)
        return dense if weight is dense else torch.where(mask, weight, dense), moved

    def workspace(self, m: int, n: int) -> int:
        """Four float32 numbers and a mask a weight are there while candidates are chosen."""
        return super().workspace(m, n) + 17 * m * n


class _Rows:
    """All rows of one weight [m, n] at once; a row that has ended stays as it is."""

    def __init__(self, dense: Tensor, weight: Tensor, mask: Tensor, stats: ActivationStats):
        sums = stats.input_sums().to(dense.device)
        kept = torch.where(mask, weight.detach().to(torch.float32), 0)
        dense = dense.detach().to(torch.float32)
        self.mask = mask.clone()
        self.error = (dense - kept) @ sums
        # What each position would take off the error by coming back, or add to it by going.
        self.effect = torch.where(mask, kept, dense).mul_(sums)
        self.cost = kept.abs_().mul_(stats.input_norms().to(dense.device))  # Wanda's score
        self.cost.masked_fill_(~mask, INFINITE)
        variance = stats.input_variance().to(dense.device).clamp_min(torch.finfo(torch.float32).tiny)
        self.gain = (self.effect / variance).masked_fill_(mask, 0)

    def swap(self, group: int | None) -> Tensor:
        """The new mask; ``group`` is M of N:M."""
        rows, sign = torch.arange(len(self.mask), device=self.mask.device), self.error.sign()
        back = torch.stack([self._back(1), self._back(-1)])
        gone = None if group else torch.stack([self._gone(1), self._gone(-1)])
        used = torch.zeros(2, len(rows), dtype=torch.long, device=rows.device)
        active = torch.ones_like(rows, dtype=torch.bool)
        for _ in range(back.shape[-1]):
            active &= self.error.abs() > THRESHOLD
            if not bool(active.any()):
                break
            side = (self.error < 0).long()  # 0: the error is positive
            place = used[side, rows]
            used[side, rows] += 1
            grown = back[side, rows, place]
            gain = self.gain[rows, grown]
            active &= torch.where(side == 0, gain, -gain) > 0
            pruned = self._gone_in_group(rows, grown, group) if group else gone[side, rows, place]
            change = self.effect[rows, pruned] - self.effect[rows, grown]
            after = self.error + change
            nearer = (after.abs() < self.error.abs()) & (after.sign() == sign)
            free = self.cost[rows, pruned] < INFINITE
            if group:  # another group may have one to spare
                active &= nearer | ~free
            else:
                lowers = torch.where(side == 0, self.effect[rows, pruned] < 0, self.effect[rows, pruned] > 0)
                active &= nearer & free & lowers
            swapped = active & free
            self.error += torch.where(swapped, change, 0)
            self.mask[rows[swapped], grown[swapped]] = True
            self.mask[rows[swapped], pruned[swapped]] = False
            self.cost[rows[swapped], pruned[swapped]] = INFINITE
        return self.mask

    def _back(self, sign: int) -> Tensor:
        """Removed weights that lower an error of this sign, the best first: int64 [m, cycles]; others may follow."""
        return first(self.gain * sign, CYCLES)

    def _gone(self, sign: int) -> Tensor:
        """Kept weights whose loss lowers an error of this sign, those with the smallest Wanda score first."""
        return first(-self.cost.masked_fill(self.effect * sign >= 0, INFINITE), CYCLES)

    def _gone_in_group(self, rows: Tensor, grown: Tensor, group: int) -> Tensor:
        start = grown - grown % group
        columns = start.unsqueeze(1) + torch.arange(group, device=start.device)
        return start + self.cost[rows.unsqueeze(1), columns].argmin(1)


def first(scores: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` highest scores of every row, highest first, of equal ones the lower: int64 [m, count].

    All n of them when there are fewer. (A sort of whole rows would need an int64 for every weight.)
    """
    m, n = scores.shape
    columns = keep_highest(scores, min(count, n)).nonzero()[:, 1].view(m, -1)
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
