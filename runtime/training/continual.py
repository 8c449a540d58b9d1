"""Figures of continual learning from a table of scores: what a sequence of tasks gained, and what it forgot.

``scores[i][j]`` is the score on task j after training tasks 1 to i, in order; row 0 is before any training, so a
sequence of N tasks has N + 1 rows and N columns. Definitions: Lopez-Paz and Ranzato, arXiv 1706.08840 (ACC, BWT, FWT),
Chaudhry et al., arXiv 1801.10112 (forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_rt.errors import UserError

Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class ContinualMetrics:
    """``acc`` is the mean final score, ``last`` that of the last task, ``bwt`` is negative when tasks are forgotten,
    ``forgetting`` what the best earlier score was better by, ``fwt`` what a task gained before it was trained.
    """

    acc: float
    last: float
    bwt: float
    forgetting: float
    fwt: float


def metrics(scores: Table) -> ContinualMetrics:
    """From scores of which higher is better, such as accuracies."""
    n = _check(scores)
    final, earlier = scores[n], range(n - 1)
    return ContinualMetrics(
        acc=sum(final) / n,
        last=final[n - 1],
        bwt=_mean(final[j] - scores[j + 1][j] for j in earlier),
        forgetting=_mean(max(scores[i][j] for i in range(1, n)) - final[j] for j in earlier),
        fwt=_mean(scores[j][j] - scores[0][j] for j in range(1, n)),
    )


def perplexity_metrics(perplexities: Table) -> ContinualMetrics:
    """From perplexities, of which lower is better: ``acc`` is their geometric mean, ``last`` a perplexity.

    The others are shares of a perplexity, so that tasks of different difficulty weigh the same: bwt is the mean of
    (PPL[j, j] - PPL[N, j]) / PPL[j, j], forgetting that of (PPL[N, j] - min PPL[i, j]) / min PPL[i, j], fwt that of
    (PPL[0, j] - PPL[j-1, j]) / PPL[0, j].
    """
    n = _check(perplexities)
    if any(not (math.isfinite(value) and value >= 1) for row in perplexities for value in row):
        raise UserError("a perplexity is a finite number from 1 on")
    final, earlier = perplexities[n], range(n - 1)
    best = [min(perplexities[i][j] for i in range(1, n)) for j in earlier]
    return ContinualMetrics(
        acc=math.exp(_mean(math.log(value) for value in final)),
        last=final[n - 1],
        bwt=_mean(1 - final[j] / perplexities[j + 1][j] for j in earlier),
        forgetting=_mean(final[j] / best[j] - 1 for j in earlier),
        fwt=_mean(1 - perplexities[j][j] / perplexities[0][j] for j in range(1, n)),
    )


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _check(table: Table) -> int:
    """Number of tasks."""
    n = len(table) - 1
    if n < 2 or any(len(row) != n for row in table):
        shape = [len(row) for row in table]
        raise UserError(f"N tasks, at least 2, have N + 1 rows of N scores; got rows of {shape}")
    return n
