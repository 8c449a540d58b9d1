"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, repair with the columns to the right."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError
from sparse_rt.formats import Format, all_finite
from sparse_rt.formats.base import check_sparsity, num_kept
from sparse_rt.formats.selection import keep_highest
from sparse_rt.pruning import cholesky
from sparse_rt.pruning.base import Pruner, register_pruner, selection_bytes
from sparse_rt.pruning.statistics import ActivationStats

BLOCK = 128
DAMPING = 0.01


@register_pruner
class SparseGPT(Pruner):
    """With H = (2/N) sum X^T X + damping and U the upper Cholesky factor of H^-1, a weight costs w^2 / U_jj^2.

    N:M chooses at every multiple of M; unstructured chooses over each block of 128 columns, so that the blocks
    together keep exactly the requested number. Everything is float32.
    """

    name = "sparsegpt"
    needs_calibration = True
    needs_gram = True

    def prune(
        self, weight: Tensor, stats: ActivationStats | None, fmt: Format, sparsity: float | None
    ) -> tuple[Tensor, Tensor]:
        stats = self.calibrated(stats)
        new = weight.detach().to(torch.float32, copy=True)
        gram = stats.gram.to(new.device)
        new[:, gram.diagonal() == 0] = 0  # inputs that were zero all the time: their weights do nothing
        factor = inverse_factor(gram, 2 / stats.sequences)
        mask = torch.zeros(new.shape, dtype=torch.bool, device=new.device)
        n, step = new.shape[1], _block_width(fmt)
        for start in range(0, n, step):
            stop = min(start + step, n)
            keep = None if fmt.group else _keep_of_block(new.shape[0], start, stop, check_sparsity(sparsity))
            block, errors, mask[:, start:stop] = _prune_block(
                new[:, start:stop].clone(), factor[start:stop, start:stop], fmt, keep
            )
            new[:, start:stop] = block
            new[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        del factor
        if not all_finite(new):
            raise SparseRTError("SparseGPT produced weights that are not finite; use --method wanda for this model")
        return new, mask

    def workspace(self, m: int, n: int) -> int:
        """The factor, the weight in float32 with its mask, and for one block of columns five of their numbers and the
        selection."""
        return 4 * n * n + 5 * m * n + 20 * m * min(BLOCK, n) + selection_bytes(m, min(BLOCK, n))


def inverse_factor(gram: Tensor, scale: float) -> Tensor:
    """Upper Cholesky factor of the inverse of H + 0.01 mean(diag H) I, H = ``scale`` ``gram`` [n, n] with 1 for zeros
    of its diagonal.

    Few calibration tokens can leave float32 rounding below zero: the damping is then raised tenfold, twice at most. One
    matrix is there at a time, besides ``gram``.
    """
    diagonal = gram.diagonal() * scale
    damping = DAMPING * diagonal.masked_fill(diagonal == 0, 1).mean()
    for _ in range(3):
        factor = gram * scale
        diagonal = factor.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += damping
        factor = cholesky.factor_(factor)
        if factor is not None:
            factor = cholesky.factor_(cholesky.inverse_(factor), upper=True)
        if factor is not None:
            return factor
        damping = 10 * damping
    raise SparseRTError(
        "SparseGPT: the second moments of the inputs are not positive definite; use more calibration data "
        "(--num-samples) or --method wanda"
    )


def _block_width(fmt: Format) -> int:
    """Columns handled together: 128, or the nearest lower multiple of M (M itself when that is larger)."""
    return BLOCK if not fmt.group else max(BLOCK // fmt.group, 1) * fmt.group


def _keep_of_block(m: int, start: int, stop: int, sparsity: float) -> int:
    """The share of one column block such that all blocks together keep exactly the number of the whole matrix."""
    return num_kept(m * stop, sparsity) - num_kept(m * start, sparsity)


def _prune_block(block: Tensor, factor: Tensor, fmt: Format, keep: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(pruned block, errors for the columns to the right, mask), [m, b] each; ``keep`` None chooses group by group."""
    errors = torch.zeros_like(block)
    cost = factor.diagonal().square()
    mask = torch.zeros(block.shape, dtype=torch.bool, device=block.device)
    if keep is not None:
        mask = keep_highest((block.square() / cost).flatten(), keep).view(block.shape)
    for j in range(block.shape[1]):
        if keep is None and j % fmt.group == 0:
            stop = j + fmt.group
            mask[:, j:stop] = fmt.mask_from_scores(block[:, j:stop].square() / cost[j:stop])
        errors[:, j] = torch.where(mask[:, j], 0.0, block[:, j]) / factor[j, j]
        block[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
    return torch.where(mask, block, 0.0), errors, mask
