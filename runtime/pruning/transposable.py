"""Transposable N:M masks: N kept in every row *and* every column of each M x M block, so W^T obeys the pattern too.

After TSENOR (Meng, Makni and Mazumder, arXiv 2505.23949). For a block of scores S the mask maximises sum S_ij X_ij with
rows and columns of sum N and 0 <= X <= 1, a transport problem:

1. It is solved with an entropy term for all blocks at once. Where TSENOR takes -x log x and enforces X <= 1 by the
   projections of Dykstra, this takes -x log x - (1 - x) log(1 - x), which has the cap built in: X_ij is then
   sigmoid(t S_ij + u_i + v_j). All u make a Newton step, then all v, in turn, while the temperature 1 / t falls.
2. The fractional X is rounded: entries from the largest down, wherever row and column still have room.
3. Where that leaves a row and a column short, a swap completes both at the least loss.
4. Exchanges between two rows follow while they raise the sum.

For M <= 4 there are 90 masks at most: the best of all is taken, exactly.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.formats.nm import is_transposable, kept_of

# t for scores between 0 and 1, and rounds of Newton steps with each. Blocks of |normal| and of heavy-tailed scores then
# have 99.96 % and more of the best sum at 1:8 to 6:8 and 16:32; 40 rounds of Dykstra's projections gave 99.8 % at 4:8.
SHARPNESS, ROUNDS = (10.0, 30.0, 90.0), 4
LONGEST_STEP = 5.0  # in log odds: where all of a row is nearly decided Newton would leap
SWEEPS = 2  # of exchanges between rows, at most
ENUMERATED = 4  # largest M whose masks are enumerated
# Scores worked on at once, so that they stay in a cache, and the fewest blocks: rounding takes M x M steps, whether for
# one or for hundreds of them.
CHUNK, FEWEST = 1 << 19, 256


class TransposableFormat(Format):
    """An N:M format whose masks are chosen transposable; stored it is the plain pattern."""

    def __init__(self, inner: Format):
        if inner.group is None:
            raise ValueError(f"{inner.pattern} has no groups")
        super().__init__(inner.pattern)
        self.inner, self.group, self.default_sparsity = inner, inner.group, inner.default_sparsity
        self.metadata_name = inner.metadata_name

    @classmethod
    def parse(cls, pattern: str) -> None:
        """No pattern means this: it is a way to choose a mask, not to store one."""

    def refuse_shape(self, m: int, n: int) -> str | None:
        reason = self.inner.refuse_shape(m, n)
        if reason is None and m % self.group:
            reason = f"{m} rows are not a multiple of {self.group}, as a transposable mask needs"
        return reason

    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, scope: str = "matrix") -> Tensor:
        return transposable_mask(scores, kept_of(self.inner), self.group)

    def allows(self, mask: Tensor) -> bool:
        """Whether every M x M block of ``mask`` (bool [m, n]) keeps N in each row and each column."""
        return is_transposable(mask, kept_of(self.inner), self.group)

    def mask_of(self, weight: Tensor) -> Tensor:
        return self.inner.mask_of(weight)

    def pack_mask(self, mask: Tensor) -> Tensor:
        return self.inner.pack_mask(mask)

    def unpack_mask(self, metadata: Tensor, m: int, n: int) -> Tensor:
        return self.inner.unpack_mask(metadata, m, n)

    def values_shape(self, m: int, n: int, nnz: int) -> tuple[int, ...]:
        return self.inner.values_shape(m, n, nnz)

    def metadata_shape(self, m: int, n: int) -> tuple[int, ...]:
        return self.inner.metadata_shape(m, n)

    def num_values(self, metadata: Tensor, m: int, n: int) -> int:
        return self.inner.num_values(metadata, m, n)

    def check_metadata(self, name: str, metadata: Tensor, m: int, n: int) -> None:
        self.inner.check_metadata(name, metadata, m, n)


def transposable_mask(scores: Tensor, kept: int, group: int) -> Tensor:
    """The mask of (nearly) the highest sum of ``scores`` [m, n]: bool [m, n], exactly N of M everywhere, ties or not.

    m and n are multiples of M.
    """
    m, n = scores.shape
    blocks = scores.detach().view(m // group, group, n // group, group)
    mask = torch.empty(blocks.shape, dtype=torch.bool, device=scores.device)
    chunk = max(CHUNK, FEWEST * group * group)
    step = max(1, chunk // (group * n))  # rows of blocks
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step].to(torch.float32).permute(1, 3, 0, 2)
        found = _solve(piece.reshape(group, group, -1), kept)
        mask[start : start + step] = found.view(piece.shape).permute(2, 0, 3, 1)
    return mask.view(m, n)


# From here on B blocks are [M, M, B]: rows, columns, blocks. Sums over a row or column then run along whole vectors.


def _solve(scores: Tensor, kept: int) -> Tensor:
    """bool [M, M, B] for scores [M, M, B]."""
    scores = scores.nan_to_num(0.0, 1e30, -1e30)
    low, high = scores.amin((0, 1)), scores.amax((0, 1))
    scores = (scores - low) / (high - low).clamp_min_(torch.finfo(torch.float32).tiny)
    if len(scores) <= ENUMERATED:
        return _best_of_all(scores, kept)
    return _improve(scores, _complete(scores, _round(_transport(scores, kept), kept), kept))


@lru_cache
def _all_masks(kept: int, group: int) -> Tensor:
    """Every M x M mask with N in each row and column, bool [count, M, M]."""
    rows = [
        torch.zeros(group, dtype=torch.bool).index_fill_(0, torch.tensor(places), True)
        for places in itertools.combinations(range(group), kept)
    ]
    masks = (torch.stack(chosen) for chosen in itertools.product(rows, repeat=group))
    return torch.stack([mask for mask in masks if bool((mask.sum(0) == kept).all())])


def _best_of_all(scores: Tensor, kept: int) -> Tensor:
    masks = _all_masks(kept, len(scores)).to(scores.device)
    sums = masks.flatten(1).to(scores.dtype) @ scores.flatten(0, 1)
    return masks.permute(1, 2, 0)[:, :, sums.argmax(0)]


def _transport(scores: Tensor, kept: int) -> Tensor:
    """The log odds of X at the entropic optimum."""
    group, _, count = scores.shape
    rows, columns = scores.new_zeros(group, 1, count), scores.new_zeros(1, group, count)
    before = SHARPNESS[0]
    for sharpness in SHARPNESS:
        rows, columns = (potential.mul_(sharpness / before) for potential in (rows, columns))
        scaled, before = scores * sharpness, sharpness
        for _ in range(ROUNDS):
            for potential, dim in ((rows, 1), (columns, 0)):
                x = (scaled + rows).add_(columns).sigmoid_()
                total = x.sum(dim, keepdim=True)
                slope = total - x.square_().sum(dim, keepdim=True)
                potential -= total.sub_(kept).div_(slope.clamp_min_(1e-3)).clamp_(-LONGEST_STEP, LONGEST_STEP)
    return scaled.add_(rows).add_(columns)


def _round(plan: Tensor, kept: int) -> Tensor:
    """From the largest entry down (of equal ones the first), wherever row and column still have room."""
    group, _, count = plan.shape
    order = plan.flatten(0, 1).argsort(dim=0, descending=True, stable=True)
    mask = torch.zeros(group * group, count, dtype=torch.bool, device=plan.device)
    rows, columns = (torch.full((group, count), kept, device=plan.device) for _ in range(2))
    for place in order.unsqueeze(1):
        row, column = place // group, place % group
        free = (rows.gather(0, row) > 0) & (columns.gather(0, column) > 0)
        mask.scatter_(0, place, free)
        taken = -free.long()
        rows.scatter_add_(0, row, taken)
        columns.scatter_add_(0, column, taken)
    return mask.view(group, group, count)


def _complete(scores: Tensor, mask: Tensor, kept: int) -> Tensor:
    """Fill the rows and columns that rounding left short, one entry of each at a time, exactly.

    An entry of a short row i and a short column j is set where one is free. Where none is, there is a set entry (a, b)
    with (i, b) and (a, j) free. For were there none, a row a that is free in column j would have its entries in columns
    taken in row i, fewer than N, and so be short; a column b that is free in row i would have its entries in rows taken
    in column j and be short, too; and (a, b) would be a free entry of both. So (a, b) goes, (i, b) and (a, j) come, at
    the least loss.
    """
    group = len(mask)
    while True:
        short = (mask.sum(1) < kept).any(0).nonzero().squeeze(1)
        if not len(short):
            return mask
        part, score, each = mask[:, :, short], scores[:, :, short], torch.arange(len(short), device=mask.device)
        both = (part.sum(1, keepdim=True) < kept) & (part.sum(0, keepdim=True) < kept)
        direct = both & ~part
        simple = direct.flatten(0, 1).any(0)
        place = score.masked_fill(~direct, -torch.inf).flatten(0, 1).argmax(0)
        place = torch.where(simple, place, both.flatten(0, 1).to(torch.uint8).argmax(0))
        i, j = place // group, place % group
        row, column = part[i, :, each].T.unsqueeze(0), part[:, j, each].unsqueeze(1)
        gain = score[i, :, each].T.unsqueeze(0) + score[:, j, each].unsqueeze(1) - score
        best = gain.masked_fill(~part | row | column, -torch.inf).flatten(0, 1).argmax(0)
        a, b = best // group, best % group
        part[i[simple], j[simple], each[simple]] = True
        a, b, i, j, each = (index[~simple] for index in (a, b, i, j, each))
        part[a, b, each], part[i, b, each], part[a, j, each] = False, True, True
        mask[:, :, short] = part


def _improve(scores: Tensor, mask: Tensor) -> Tensor:
    """Two rows exchange one entry each, the best such exchange of every pair, while any raises the sum.

    The pairs of a round share no row (a round robin), so all of them move at once.
    """
    rounds = _round_robin(len(scores), scores.device)
    for _ in range(SWEEPS):
        moved = 0
        for one, two in rounds:
            a, b = mask[one], mask[two]
            change = scores[two] - scores[one]  # of moving an entry of the first row to the second
            down = change.masked_fill(~a | b, -torch.inf)
            up = change.neg_().masked_fill_(~b | a, -torch.inf)
            pair, block = (down.amax(1) + up.amax(1) > 1e-6).nonzero(as_tuple=True)
            moved += len(pair)
            for moving in (down, up):
                column = moving[pair, :, block].argmax(1)
                mask[one[pair], column, block] ^= True
                mask[two[pair], column, block] ^= True
        if not moved:
            break
    return mask


@lru_cache
def _round_robin(group: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Every pair of rows once, as rounds of pairs without a common row: (first rows, second rows) of each."""
    places = list(range(group + group % 2))  # of an odd number one row rests
    found = []
    for _ in range(len(places) - 1):
        pairs = [(a, b) for a, b in zip(places, reversed(places), strict=True)][: len(places) // 2]
        pairs = [pair for pair in pairs if max(pair) < group]
        found.append(tuple(torch.tensor(side, device=device) for side in zip(*pairs, strict=True)))
        places = [places[0], places[-1], *places[1:-1]]
    return found
