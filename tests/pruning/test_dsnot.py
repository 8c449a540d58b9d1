"""DSnoT: the rules of its paper and published code, row by row in float64."""

import pytest
import torch

from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner


def setting(m=12, n=128, seed=0, mean=0.5):
    """A weight, and inputs [4, 40, n] with means of their own, one of them constant and one silent."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(m, n, generator=generator), torch.randn(4, 40, n, generator=generator)
    x = x * (0.3 + torch.rand(n, generator=generator)) + mean * torch.randn(n, generator=generator)
    x += 0.2 * torch.randn(4, 1, n, generator=generator)  # sequences differ in their means
    x[..., 3], x[..., 7] = 0.05, 0
    return weight, x, stats_of(x)


def stats_of(x):
    stats = ActivationStats(x.shape[-1], gram=True, moments=True)
    for sequence in x:
        stats.add(sequence)
    return stats


def swap_row(dense, kept, mask, x, group):
    """One row: (mask after, error before, error after)."""
    x = x.double()
    sums, variance = x.sum(1).mean(0), x.var(1, unbiased=False).mean(0)
    norms = x.square().sum(1).mean(0).sqrt()
    mask, start = mask.tolist(), mask.tolist()
    back, lost = dense.double() * sums, kept.double() * sums
    error = first = float((dense.double() * sums).sum() - sum(lost[j] for j in range(len(mask)) if start[j]))
    moved = set()
    for _ in range(50):
        if abs(error) <= 0.1:
            break
        sign = 1 if error > 0 else -1
        options = [j for j in range(len(mask)) if not start[j] and j not in moved and back[j] * sign > 0]
        if not options:
            break
        grown = max(options, key=lambda j: float(back[j]) * sign / max(float(variance[j]), 1e-38))
        options = [j for j in range(len(mask)) if start[j] and j not in moved]
        if group:
            options = [j for j in options if j // group == grown // group]
        else:
            options = [j for j in options if lost[j] * sign < 0]
        if not options:
            if not group:
                break
            moved.add(grown)
            continue
        pruned = min(options, key=lambda j: float(kept[j].double().abs() * norms[j]))
        after = error + float(lost[pruned]) - float(back[grown])
        if after * first <= 0 or abs(after) >= abs(error):
            break
        moved |= {grown, pruned}
        mask[grown], mask[pruned], error = True, False, after
    return torch.tensor(mask), first, error


@pytest.mark.parametrize("first", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "unstructured"])
def test_positions_move_by_the_rules(pattern, first):
    dense, x, stats = setting(seed=len(pattern))
    fmt, group = get_format(pattern), None if pattern == "unstructured" else int(pattern.split(":")[1])
    pruned, start = get_pruner(first).prune(dense, stats, fmt, 0.6)
    new, mask = get_pruner(f"{first}+dsnot").prune(dense, stats, fmt, 0.6)
    rows = [swap_row(d, w, m, x, group) for d, w, m in zip(dense, pruned, start, strict=True)]
    assert torch.equal(mask, torch.stack([row[0] for row in rows]))
    assert (mask != start).sum() >= (4 if first == "sparsegpt" else 20)  # the rules had something to do
    assert torch.equal(mask.sum(1), start.sum(1))
    if group:
        assert torch.equal(mask.view(12, -1, group).sum(-1), start.view(12, -1, group).sum(-1))
    # What comes back has its dense value, what stayed the value that the pruner gave it.
    assert torch.equal(new[mask & start], pruned[mask & start])
    assert torch.equal(new[mask & ~start], dense[mask & ~start])
    # The reason for it all: the expected output is nearer to the dense one.
    before, after = torch.tensor([[row[1], row[2]] for row in rows]).abs().unbind(1)
    assert (after <= before).all() and after.mean() < (0.95 if first == "sparsegpt" else 0.8) * before.mean()


def test_a_row_without_candidates_or_error_stays():
    fmt = get_format("unstructured")
    dense, x, _ = setting()
    still = stats_of(x - x.mean(1, keepdim=True))  # inputs without a mean: no error to repair
    _, start = get_pruner("wanda").prune(dense, still, fmt, 0.5)
    assert torch.equal(get_pruner("wanda+dsnot").prune(dense, still, fmt, 0.5)[1], start)
    loud = stats_of(x.abs() + 1)
    _, start = get_pruner("wanda").prune(dense.abs(), loud, fmt, 0.5)  # whatever goes, the error grows
    assert torch.equal(get_pruner("wanda+dsnot").prune(dense.abs(), loud, fmt, 0.5)[1], start)


def test_moments_survive_loud_and_nearly_constant_inputs():
    """A mean a hundred thousand times the deviation, as the massive activations of language models have."""
    x = torch.randn(3, 500, 4, generator=torch.Generator().manual_seed(0)) * 0.25 + torch.tensor([0.0, 1.0, 300.0, 2e4])
    stats = stats_of(x)
    expected = x.double().var(1, unbiased=False).mean(0)
    assert torch.allclose(stats.input_variance().double(), expected, rtol=1e-3)
    assert torch.allclose(stats.input_sums().double(), x.double().sum(1).mean(0), rtol=1e-5)


def test_a_repair_refuses_to_guess():
    with pytest.raises(UserError, match="needs calibration data"):
        get_pruner("magnitude+dsnot").prune(torch.ones(1, 4), None, get_format("2:4"), None)
