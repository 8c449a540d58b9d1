"""What a pruner may know about the inputs of a linear layer, collected without keeping them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError
from sparse_rt.formats.selection import pieces

# Inputs kept to measure the reconstruction error: enough for two digits, small beside a block of a large model.
SAMPLE_ROWS = 512


class ActivationStats:
    """Fed with the inputs X [T, n] of a linear, one calibration sequence at a time.

    ``gram`` adds X^T X [n, n] in float32, ``moments`` sum and variance of every input. ``expected_sequences`` spreads
    a sample of ``SAMPLE_ROWS`` inputs evenly over the sequences; on it ``reconstruction_error`` measures what pruning
    did to the layer's output.
    """

    def __init__(
        self,
        n: int,
        device: torch.device | str = "cpu",
        gram: bool = False,
        expected_sequences: int = 1,
        moments: bool = False,
    ):
        self.n, self.sequences, self.tokens = n, 0, 0
        self.sum_squares = torch.zeros(n, dtype=torch.float32, device=device)
        self.gram = torch.zeros(n, n, dtype=torch.float32, device=device) if gram else None
        self._total = torch.zeros(n, dtype=torch.float32, device=device) if moments else None
        self._deviations = torch.zeros(n, dtype=torch.float32, device=device) if moments else None
        self._rows_each = math.ceil(SAMPLE_ROWS / max(expected_sequences, 1))
        # In one piece: rows kept one by one among the temporaries of a block tear holes into the heap (15 MB more
        # were measured on a model 1024 wide).
        rows = min(self._rows_each * max(expected_sequences, 1), 2 * SAMPLE_ROWS)
        self._sample = torch.empty(rows, n, dtype=torch.float32, device=device)
        self._sampled = 0

    def add(self, x: Tensor) -> None:
        """One sequence: x [..., n] of any float dtype."""
        x = x.detach().reshape(-1, self.n).to(torch.float32)
        self.sequences += 1
        self.tokens += x.shape[0]
        self.sum_squares += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        if self._total is not None:
            self._add_moments(x)
        step = max(1, x.shape[0] // self._rows_each)
        self._keep(x[::step][: self._rows_each])

    def _keep(self, rows: Tensor) -> None:
        end = self._sampled + len(rows)
        if end > len(self._sample):  # more sequences than expected, or than rows are wanted
            kept = self.sample()
            self._sample = kept.new_empty(2 * end, self.n)
            self._sample[: len(kept)] = kept
        self._sample[self._sampled : end] = rows
        self._sampled = end

    def _add_moments(self, x: Tensor) -> None:
        """From the mean of the sequence: E[x^2] - E[x]^2 would lose the variance of loud, nearly constant inputs."""
        total = x.sum(0)
        self._total += total
        self._deviations += (x - total / x.shape[0]).square_().sum(0)

    def sums(self) -> list[Tensor]:
        """What several processes add up, each in place, to have the statistics of all their sequences."""
        return [t for t in (self.sum_squares, self.gram, self._total, self._deviations) if t is not None]

    def sample(self) -> Tensor:
        """The sampled inputs, float32 [k, n]."""
        return self._sample[: self._sampled]

    def take_over(self, sequences: int, tokens: int, samples: list[Tensor]) -> None:
        """Complete ``sums`` that were added up over processes: how much they saw together, and their samples."""
        self.sequences, self.tokens = sequences, tokens
        self._sampled = 0
        for rows in samples:
            self._keep(rows)

    def input_sums(self) -> Tensor:
        """Mean over sequences of the sum over tokens of every input, float32 [n]; needs ``moments``."""
        return self._total / self.sequences

    def input_variance(self) -> Tensor:
        """Variance of every input within a sequence, averaged over all tokens, float32 [n]; needs ``moments``."""
        return self._deviations / self.tokens

    def input_norms(self) -> Tensor:
        """sqrt of the mean over sequences of ||X_:j||^2, float32 [n]."""
        return (self.sum_squares / self.sequences).sqrt()

    def permute(self, order: Tensor) -> None:
        """As if input j had been input ``order[j]`` (int64 [n]) all along."""
        self.sum_squares = self.sum_squares[order]
        if self.gram is not None:
            self.gram = self.gram[order][:, order]
        if self._total is not None:
            self._total, self._deviations = self._total[order], self._deviations[order]
        self._sample = self.sample()[:, order]

    def check_finite(self, name: str) -> None:
        """``SparseRTError`` when an input of layer ``name`` was NaN or Inf: nothing sensible can be pruned by it."""
        if not bool(torch.isfinite(self.sum_squares).all()):
            raise SparseRTError(
                f"the calibration inputs of {name} are not finite: the model overflows in its own dtype; "
                "check the source model, or use a method without calibration (--method magnitude)"
            )

    def reconstruction_error(self, before: Tensor, after: Tensor) -> float:
        """||X W^T - X W'^T|| / ||X W^T|| (Frobenius norms) over the sampled inputs."""
        x, difference, total = self.sample(), 0.0, 0.0
        for rows in pieces(*before.shape):
            reference = x @ before[rows].to(x).T
            total += float(reference.square().sum(dtype=torch.float64))
            difference += float(reference.sub_(x @ after[rows].to(x).T).square_().sum(dtype=torch.float64))
        return (difference / max(total, torch.finfo(torch.float64).tiny)) ** 0.5
