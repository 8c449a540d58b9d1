"""RIA: the score of its paper, in float64."""

import pytest
import torch

from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner


def setting(m=24, n=64, seed=0):
    """A weight [m, n] with a silent input and an all-zero row and column, its inputs [4, 32, n], statistics of them."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(m, n, generator=generator), torch.randn(4, 32, n, generator=generator)
    x *= torch.rand(n, generator=generator).exp() ** 2
    x[..., 3] = 0
    weight[:, 5] = 0
    weight[6] = 0
    stats = ActivationStats(n)
    for sequence in x:
        stats.add(sequence)
    return weight, x, stats


def scores_of(weight, x):
    """Equation by equation, one weight at a time."""
    a, norms = weight.double().abs(), [float((column**2).sum() / len(x)) ** 0.5 for column in x.double().unbind(2)]
    scores = torch.zeros_like(a)
    for i, j in (a > 0).nonzero().tolist():
        scores[i, j] = (a[i, j] / a[:, j].sum() + a[i, j] / a[i].sum()) * norms[j] ** 0.5
    return scores


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "unstructured"])
def test_ria_ranks_by_relative_importance_and_activation(pattern):
    weight, x, stats = setting()
    scores = scores_of(weight, x)
    new, mask = get_pruner("ria").prune(weight, stats, get_format(pattern), 0.6)
    assert new is weight
    kept, group = (64 - int(64 * 0.6), 64) if pattern == "unstructured" else map(int, pattern.split(":"))
    expected = torch.zeros(len(weight), weight.shape[1] // group, group, dtype=torch.bool)
    best = scores.view(expected.shape).argsort(dim=-1, descending=True, stable=True)[..., :kept]
    expected = expected.scatter_(-1, best, True).view(weight.shape)
    assert torch.equal(mask, expected)


def test_no_input_of_small_weights_is_lost():
    """What relative importance is for: Wanda drops an input whose weights are a hundred times smaller than all."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 9] *= 0.01
    stats = ActivationStats(64)
    stats.add(torch.ones(1, 8, 64))
    fmt = get_format("unstructured")
    _, absolute = get_pruner("wanda").prune(weight, stats, fmt, 0.5)
    _, relative = get_pruner("ria").prune(weight, stats, fmt, 0.5)
    assert not absolute[:, 9].any() and relative[:, 9].sum() >= 6
