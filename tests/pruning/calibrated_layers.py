"""Small layers with inputs like those of language models, and what is best for them, in float64."""

import torch

from sparse_rt.pruning import ActivationStats

DEAD = 3  # the input that ``layer`` keeps at zero


def correlated_inputs(sequences=6, tokens=48, n=64, seed=0):
    """Inputs with correlated columns and a few loud ones, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + 1.0 * torch.randn(n, n, generator=generator) / n**0.5
    scale = torch.ones(n)
    scale[:: n // 8] = 6.0
    return [torch.randn(tokens, n, generator=generator) @ mix * scale for _ in range(sequences)]


def layer(m=24, n=64, seed=0):
    """(weight, inputs) with one dead input."""
    inputs = correlated_inputs(n=n, seed=seed)
    for x in inputs:
        x[:, DEAD] = 0
    return torch.randn(m, n), inputs


def stats_of(inputs):
    stats = ActivationStats(inputs[0].shape[-1], gram=True, expected_sequences=len(inputs), moments=True)
    for x in inputs:
        stats.add(x.unsqueeze(0))
    return stats


def gram_of(inputs):
    return sum(x.double().T @ x.double() for x in inputs)


def output_error(weight, new, gram):
    """||X W^T - X W'^T||^2 / ||X W^T||^2."""
    weight, difference = weight.double(), weight.double() - new.double()
    return float(((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum())


def least_squares(weight, mask, gram):
    """The best weight that is zero outside ``mask``, row by row from the normal equations."""
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row].double())
    return best
