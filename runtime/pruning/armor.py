"""ARMOR (Liu et al., arXiv 2510.05528): a weight as an N:M core between two block-diagonal matrices.

    minimise  L = sum_ij d_j (V - A S B)_ij^2        V = W / (column norms), then / (row norms);  d_j = mean of X_:j^2

over block-diagonal A, B and an N:M core S. The start is NoWag-P (arXiv 2504.14569): A = B = I, and S = V where
d_j V_ij^2 is largest in its group. From there on L is minimised over one of the three at a time, the others fixed, each
step exactly, so L never rises:

    A   one weighted least-squares problem a row of blocks
    B   one least-squares problem a column of blocks (the d_j weigh whole columns, so they cancel)
    S   group by group: for every choice of N of M columns the best values are a small linear system; the best choice
        stays. Groups in different blocks do not see each other, so all blocks of the weight take a step at once.

The paper takes gradient steps on A, B and the values of S (in its experiments Adam, 20,000 of them) and updates one
group a block in between, drawn at random. The problem is the same, and so is the update of a group.

At the end the norms go into the wrapper: W is about (row norms A) S (B column norms).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError
from sparse_rt.formats import Format, all_finite
from sparse_rt.formats.wrapper import Wrapper
from sparse_rt.pruning.base import Pruned, Pruner, register_pruner
from sparse_rt.pruning.statistics import ActivationStats

# Rounds over A, B and S at most, and the share of L that one must save for the next to follow.
ROUNDS, LEAST_GAIN = 40, 1e-3
# Blocks of at most this size, and of at most this share of the smaller side: the paper's blocks of 128 in matrices of
# 4096. A bfloat16 wrapper then takes at most a sixteenth of the dense weight.
LARGEST_BLOCK, SHARE_OF_SIDE = 128, 32
MOST_CHOICES = 70  # of N in M columns: 4:8 has as many
_DAMPING = 1e-6  # of the diagonal of a system's matrix; it pulls towards the values of before, which keeps L falling


@register_pruner
class Armor(Pruner):
    """N:M patterns with few choices a group. ``block`` is the largest block of the wrapper, None: by the shape."""

    name = "armor"
    needs_calibration = True
    keeps_columns = False
    wraps = True
    block: int | None = None
    rounds = ROUNDS

    def refuse_pattern(self, fmt: Format) -> str | None:
        if fmt.group is not None and math.comb(fmt.group, _kept(fmt)) <= MOST_CHOICES:
            return None
        return f"it tries every choice of N in M columns, at most {MOST_CHOICES}; use 2:4, 1:4 or 4:8"

    def blocks(self, m: int, n: int, fmt: Format) -> tuple[int, int]:
        """(rows of a block of A, columns of a block of B) for a weight (m, n): divisors, whole groups of columns."""
        most = self.block or max(1, min(LARGEST_BLOCK, min(m, n) // SHARE_OF_SIDE))
        columns = [size for size in range(fmt.group, most + 1, fmt.group) if n % size == 0]
        return max(size for size in range(1, most + 1) if m % size == 0), max(columns, default=fmt.group)

    def prune(self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None) -> Pruned:
        """The core in float32, its mask, and the wrapper in float32."""
        stats = self.calibrated(stats)
        m, n = weight.shape
        importance = (stats.sum_squares / stats.tokens).to(weight.device)
        columns = _norms(weight.float(), 0)
        rows = _norms(weight.float() / columns, 1)
        normalised = weight.float() / columns / rows[:, None]
        found = factorize(normalised, importance, fmt, *self.blocks(m, n, fmt), self.rounds)
        out = found.out * rows.view(*found.out.shape[:2], 1)
        inner = found.inner * columns.view(found.inner.shape[0], 1, -1)
        if not all(all_finite(tensor) for tensor in (found.core, out, inner)):
            raise SparseRTError("ARMOR produced weights that are not finite; use --method wanda for this model")
        return Pruned(found.core, found.mask, Wrapper(out, inner))

    def workspace(self, m: int, n: int) -> int:
        """The normalised weight in two orders, the core twice, residual, gradient and products with A or B: float32.

        50 bytes a weight were measured at 2:4. The 70 choices of 4:8 take 2240 / (a b) more, which is little but in
        blocks of less than 16 rows and columns.
        """
        return 52 * m * n


@dataclass(frozen=True)
class Factors:
    """A [m / a, a, a], the core S [m, n] with its mask, B [n / b, b, b]; ``losses``: L before and after each round."""

    out: Tensor
    core: Tensor
    mask: Tensor
    inner: Tensor
    losses: list[float]


def factorize(
    weight: Tensor,
    importance: Tensor,
    fmt: Format,
    a: int,
    b: int,
    rounds: int = ROUNDS,
    least_gain: float = LEAST_GAIN,
) -> Factors:
    """Minimise L for the normalised ``weight`` [m, n] and ``importance`` d [n], float32; blocks a rows, b columns."""
    m, n = weight.shape
    problem = _Problem(weight, importance, fmt, a, b)
    mask = fmt.mask_from_scores(weight.square() * importance)
    core, mask = (problem.cut(tensor) for tensor in (torch.where(mask, weight, 0.0), mask))
    out, inner = (torch.eye(size, device=weight.device).repeat(side // size, 1, 1) for size, side in ((a, m), (b, n)))
    losses = [problem.loss(out, core, inner)]
    for _ in range(rounds):
        new_out = problem.best_out(out, core, inner)
        new_inner = problem.best_inner(new_out, core, inner)
        new_core, new_mask = problem.best_core(new_out, core, mask, new_inner)
        loss = problem.loss(new_out, new_core, new_inner)
        if not loss < losses[-1]:  # nothing is left but rounding
            break
        out, core, mask, inner = new_out, new_core, new_mask, new_inner
        losses.append(loss)
        if losses[-2] - loss < least_gain * losses[-2]:
            break
    return Factors(out, problem.join(core), problem.join(mask), inner, losses)


class _Problem:
    """Matrices are cut into blocks, [n / b, m / a, a, b]: block (k, j) of A S B is A_j S_kj B_k."""

    def __init__(self, weight: Tensor, importance: Tensor, fmt: Format, a: int, b: int):
        self.shape, self.sizes, self.group = weight.shape, (a, b), fmt.group
        self.choices = _choices(fmt).to(weight.device)
        self.weight = self.cut(weight)
        self.importance = importance.view(-1, 1, b)

    def cut(self, matrix: Tensor) -> Tensor:
        (m, n), (a, b) = self.shape, self.sizes
        return matrix.view(m // a, a, n // b, b).permute(2, 0, 1, 3).contiguous()

    def join(self, blocks: Tensor) -> Tensor:
        return blocks.permute(1, 2, 0, 3).reshape(self.shape)

    def residual(self, out: Tensor, core: Tensor, inner: Tensor) -> Tensor:
        return self.weight - out @ core @ inner[:, None]

    def loss(self, out: Tensor, core: Tensor, inner: Tensor) -> float:
        weighted = self.residual(out, core, inner) * self.importance[:, None].sqrt()
        return float(torch.linalg.vector_norm(weighted, dtype=torch.float64) ** 2)

    def best_out(self, out: Tensor, core: Tensor, inner: Tensor) -> Tensor:
        right = core @ inner[:, None]
        weighted = right * self.importance[:, None]
        system = (right @ weighted.mT).sum(0)
        missing = (self.weight - out @ right) @ weighted.mT
        return out + _solve(system, missing.sum(0).mT).mT

    def best_inner(self, out: Tensor, core: Tensor, inner: Tensor) -> Tensor:
        left = out @ core
        system = (left.mT @ left).sum(1)
        missing = (left.mT @ (self.weight - left @ inner[:, None])).sum(1)
        return inner + _solve(system, missing)

    def best_core(self, out: Tensor, core: Tensor, mask: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over all groups, those at the same place of every block at once.

        With A and B fixed, L is quadratic in S_kj with the matrices A_j^T A_j (between rows) and B_k D_k B_k^T (between
        columns), so a group needs the gradient of its own row only: ``pull``, half of the negative one.
        """
        (a, b), size = self.sizes, self.group
        between_rows = out.mT @ out
        weighted = inner * self.importance
        between_columns = weighted @ inner.mT
        pull = out.mT @ (self.residual(out, core, inner) @ weighted.mT[:, None])
        solvers = self._solvers(between_columns)
        core, mask = core.clone(), torch.zeros_like(mask)
        for row in range(a):
            own, before = core[:, :, row], core[:, :, row].clone()
            scale = between_rows[:, row, row].clamp_min(torch.finfo(torch.float32).tiny).view(1, -1, 1)
            wanted = pull[:, :, row] / scale
            for place in range(b // size):
                columns = slice(place * size, (place + 1) * size)
                coupled = between_columns[:, columns]
                goal = wanted[..., columns] + own[..., columns] @ coupled[..., columns]
                values, kept = self._best_groups(goal, solvers[:, place])
                wanted -= (values - own[..., columns]) @ coupled
                own[..., columns], mask[:, :, row, columns] = values, kept
            change = (own - before) @ between_columns
            pull -= between_rows[:, :, row, None] * change[:, :, None]
        return core, mask

    def _solvers(self, between_columns: Tensor) -> Tensor:
        """[n / b, groups of a block, choices, M, M]: the inverse for the columns of each choice, zero elsewhere."""
        size, count = self.group, len(self.choices)
        places = between_columns.shape[-1] // size
        parts = between_columns.view(-1, places, size, places, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        rows, columns = self.choices[:, :, None], self.choices[:, None, :]
        systems = parts[:, :, rows, columns].double()
        systems.diagonal(dim1=-2, dim2=-1).add_(_damping(parts.double())[..., None, None])
        inverse = torch.linalg.inv(systems).to(between_columns.dtype)
        solvers = between_columns.new_zeros(*parts.shape[:2], count, size, size)
        solvers[:, :, torch.arange(count, device=rows.device)[:, None, None], rows, columns] = inverse
        return solvers

    def _best_groups(self, goal: Tensor, solvers: Tensor) -> tuple[Tensor, Tensor]:
        """The values [n / b, m / a, M] of the choice that saves most, and which of them are kept; ties: the first."""
        count, size = solvers.shape[1:3]
        values = goal @ solvers.reshape(-1, count * size, size).mT
        values = values.view(*goal.shape[:2], count, size)
        saved = (values * goal[:, :, None]).sum(-1)
        best = (saved == saved.amax(-1, keepdim=True)).int().argmax(-1)
        kept = torch.zeros(count, size, dtype=torch.bool, device=goal.device).scatter_(1, self.choices, True)
        return values.gather(2, best[..., None, None].expand(-1, -1, 1, size)).squeeze(2), kept[best]


def _choices(fmt: Format) -> Tensor:
    """int64 [choices, N]: every choice of N of M columns, in lexicographic order."""
    return torch.tensor(list(itertools.combinations(range(fmt.group), _kept(fmt))))


def _kept(fmt: Format) -> int:
    """N of N:M."""
    return fmt.values_shape(1, fmt.group, 0)[1]


def _norms(matrix: Tensor, dim: int) -> Tensor:
    """Of every column (0) or row (1), 1 where it is 0: nothing is divided by that."""
    norms = torch.linalg.vector_norm(matrix, dim=dim)
    return torch.where(norms > 0, norms, 1.0)


def _damping(systems: Tensor) -> Tensor:
    mean = systems.diagonal(dim1=-2, dim2=-1).mean(-1)
    return (_DAMPING * mean).clamp_min(torch.finfo(torch.float32).tiny)


def _solve(systems: Tensor, sides: Tensor) -> Tensor:
    """Solutions of symmetric ``systems`` [k, b, b], damped and in float64: they may be singular."""
    systems = systems.double()
    systems.diagonal(dim1=-2, dim2=-1).add_(_damping(systems)[:, None])
    return torch.linalg.solve(systems, sides.double()).to(sides.dtype)
