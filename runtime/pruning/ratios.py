"""How much of every decoder block goes: OWL (Yin et al., arXiv 2310.05175), blocks with more outliers keep more.

    D_l        = 100 * share of the scores of block l above threshold * (their mean)     Wanda's |W_ij| ||X_j||, pooled
    density_l  = 2 lambda (D_l - min D) / (max D - min D) + c                            c: the mean density is 1 - S

The mean counts weights, not blocks (the paper's blocks are all of one size), so the model as a whole has sparsity S.
With N:M patterns block l keeps N_l of M, rounded such that the mean is N again; published: a range of 2 of 8, and
threshold 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.formats.base import num_kept

UNSTRUCTURED = (0.08, 5.0)  # lambda and threshold of the paper
GROUPED = (0.125, 6.0)  # the same for N:M: N_l within 1 of N for M = 8
_DECIMALS = 10**12


def outliers_percent(weights: Sequence[tuple[Tensor, Tensor]], threshold: float) -> float:
    """D of one block: ``weights`` are its (weight [m, n], norms of its inputs [n]), any float dtype.

    Raises ``SparseRTError`` when the scores are not finite.
    """
    total = count = above = 0
    for weight, norms in weights:
        total += float(_scores(weight, norms).sum(dtype=torch.float64))
        count += weight.numel()
    if not math.isfinite(total):
        raise SparseRTError("the scores of a block are not finite; check the source model, or use --ratios uniform")
    for weight, norms in weights:
        above += int((_scores(weight, norms) > threshold * total / count).sum())
    return 100 * above / count


def _scores(weight: Tensor, norms: Tensor) -> Tensor:
    return weight.detach().to(torch.float32).abs().mul_(norms.to(weight.device, torch.float32))


def owl_densities(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Density of every block, from D and the number of weights of each; ``spread`` is lambda.

    Their mean over all weights is 1 - sparsity, their range 2 lambda (0 when no block has more outliers than another).
    """
    low, high = min(outliers), max(outliers)
    raised = [2 * spread * (found - low) / (high - low) if high > low else 0.0 for found in outliers]
    mean = math.fsum(size * more for size, more in zip(sizes, raised, strict=True)) / sum(sizes)
    return [1 - sparsity + more - mean for more in raised]


def check_spread(spread: float, sparsity: float, group: int | None = None) -> None:
    """``UserError`` when a block could be left without weights, or with all of them, whatever its outliers are.

    With ``group`` (M of N:M) the least and the most are 1 and M - 1 of M.
    """
    margin = 1 / group if group else 0.0
    most = min(1 - sparsity, sparsity) - margin
    if 2 * spread <= most + 1e-9 and most > 0:
        return
    kept = f"{round(group * (1 - sparsity))}:{group}" if group else f"a sparsity of {sparsity:g}"
    allowed = f"at most {most / 2:.4g} is possible" if most > 1e-9 else "there is no room for any; use --ratios uniform"
    raise UserError(f"--owl-lambda {spread:g} lets blocks differ by up to {2 * spread:g}; with {kept}, {allowed}")


def apportion(ideal: Sequence[float], steps: Sequence[int], total: int) -> list[int]:
    """Whole numbers k_i next to ``ideal`` with sum(steps_i k_i) as near to ``total`` as largest remainders bring it.

    All are rounded down; those that lost most go up first (of equal ones the first), while that brings the sum nearer.
    """
    counts = [math.floor(wanted + 1e-9) for wanted in ideal]
    missing = total - sum(step * count for step, count in zip(steps, counts, strict=True))
    for i in sorted(range(len(ideal)), key=lambda i: counts[i] - ideal[i]):
        if ideal[i] > counts[i] and steps[i] < 2 * missing:
            counts[i] += 1
            missing -= steps[i]
    return counts


def sparsity_keeping(kept: int, size: int) -> float:
    """A sparsity of few digits of which ``num_kept`` makes ``kept`` of ``size`` again."""
    sparsity = float(Fraction(-(-(size - kept) * _DECIMALS // size), _DECIMALS))
    if num_kept(size, sparsity) != kept:
        raise SparseRTError(f"no sparsity keeps {kept} of {size} weights")
    return sparsity
