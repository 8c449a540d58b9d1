"""ALPS is its paper's algorithm, step by step, better than what it is compared with, and ends at the least squares."""

import pytest
import torch

from calibrated_layers import DEAD, correlated_inputs, gram_of, layer, least_squares, output_error, stats_of
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import alps, get_pruner
from sparse_rt.pruning.transposable import TransposableFormat

PATTERNS = ("2:4", "4:8", "1:4", "3:32", "unstructured")


def with_ridge(gram):
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def largest(values, pattern, sparsity):
    """Mask of the largest |values| [m, n]."""
    group = values.numel() if pattern == "unstructured" else int(pattern.split(":")[1])
    keep = values.numel() - int(values.numel() * sparsity) if sparsity else int(pattern.split(":")[0])
    best = values.abs().view(-1, group).topk(keep, dim=-1).indices
    return torch.zeros(values.numel() // group, group, dtype=torch.bool).scatter_(1, best, True).view(values.shape)


def conjugate_gradients(gram, target, mask, weight, iterations):
    """Textbook, every row on its own and on the submatrix of what it keeps: [m, n]."""
    weight = weight.clone()
    for row, kept in enumerate(mask):
        matrix, right, x = gram[kept][:, kept], target[row, kept], weight[row, kept]
        residual = direction = right - matrix @ x
        for _ in range(iterations):
            step = residual.dot(residual) / direction.dot(matrix @ direction)
            x, old = x + step * direction, residual
            residual = residual - step * (matrix @ direction)
            direction = residual + residual.dot(residual) / old.dot(old) * direction
        weight[row, kept] = x
    return weight * mask


def reference(weight, inputs, pattern, sparsity):
    """(weight, mask, penalties, restarts) by the published algorithm with its B, D and V, and eigenvectors; float64."""
    dead = gram_of(inputs).diagonal() == 0
    gram = with_ridge(gram_of(inputs))
    norms = torch.where(dead, 1.0, gram.diagonal().sqrt())
    gram = gram / norms / norms[:, None]
    gram[dead, dead] = 1
    dense = torch.where(dead, 0.0, weight.double() * norms)
    target, (values, vectors) = dense @ gram, torch.linalg.eigh(gram)
    rho, grown, penalties, restarts = 0.1, False, [], 0
    before = start = largest(dense, pattern, sparsity)
    kept = int(start.sum())
    sparse, dual = dense * start, torch.zeros_like(dense)
    for step in range(300):
        inverse = vectors @ torch.diag(1 / (values + rho)) @ vectors.T
        free = (target - dual + rho * sparse) @ inverse
        mask = largest(free + dual / rho, pattern, sparsity)
        sparse = (free + dual / rho) * mask
        dual = dual + rho * (free - sparse)
        if step % 3 != 2:
            continue
        penalties.append(rho)
        change = int((mask != before).sum())
        before, settled = mask, step >= 30 and change / kept < 3e-4
        if change / kept > 0.1:
            rho, grown = rho * 1.3, True
        elif change / kept > 0.005:
            rho, grown = rho * 1.2, True
        elif change and grown:
            rho *= 1.1
        elif change:
            rho, sparse, dual, restarts = rho / 5, dense * start, torch.zeros_like(dense), restarts + 1
        elif grown:
            break
        else:
            rho /= 5
        if settled or rho < 1e-3:
            break
    mask = largest(free, pattern, sparsity)
    result = conjugate_gradients(gram, target, mask, free, 10) / norms
    result[:, dead] = torch.where(mask[:, dead], weight[:, dead].double(), 0)
    return result, mask, penalties, restarts


def record_penalties(monkeypatch):
    """A list that gets the penalty of every factorisation from now on."""
    penalties, factor = [], alps.LeastSquares.factor
    monkeypatch.setattr(alps.LeastSquares, "factor", lambda self, rho: penalties.append(rho) or factor(self, rho))
    return penalties


@pytest.mark.parametrize(
    "pattern,sparsity", [("2:4", None), ("4:8", None), ("3:32", None), ("unstructured", 0.5), ("unstructured", 0.75)]
)
def test_alps_is_the_published_algorithm(pattern, sparsity, monkeypatch):
    weight, inputs = layer()
    penalties = record_penalties(monkeypatch)
    new, mask = get_pruner("alps").prune(weight, stats_of(inputs), get_format(pattern), sparsity)
    expected, expected_mask, expected_penalties, _ = reference(weight, inputs, pattern, sparsity)
    assert penalties == pytest.approx(expected_penalties) and len(penalties) > 5
    assert torch.equal(mask, expected_mask) and new.dtype == torch.float32
    assert torch.allclose(new[mask].double(), expected[mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rest,restarts", [(0.0, 0), (0.03, 2), (0.05, 0)])
def test_weights_that_are_nearly_sparse_call_for_less_penalty(rest, restarts, monkeypatch):
    """Half of the weights are next to nothing: at first no position changes, or too few do, and ADMM starts again."""
    weight, inputs = torch.randn(24, 64), correlated_inputs()
    sparse = largest(weight, "unstructured", 0.5)
    weight = torch.where(sparse, weight + weight.sign(), rest * weight)
    penalties = record_penalties(monkeypatch)
    _, mask = get_pruner("alps").prune(weight, stats_of(inputs), get_format("unstructured"), 0.5)
    _, expected_mask, expected, expected_restarts = reference(weight, inputs, "unstructured", 0.5)
    assert penalties[1] < 0.1 and penalties == pytest.approx(expected) and expected_restarts == restarts
    assert torch.equal(mask, expected_mask) and torch.equal(mask, sparse)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_alps_beats_what_it_is_compared_with(pattern, seed):
    inputs, weight = correlated_inputs(n=96, tokens=96, seed=seed), torch.randn(32, 96)
    stats, fmt, gram, error = stats_of(inputs), get_format(pattern), gram_of(inputs), {}
    for name in ("magnitude", "wanda", "sparsegpt", "admm", "alps", "wanda+pcg"):
        new, mask = get_pruner(name).prune(weight, stats, fmt, 0.6)
        error[name] = output_error(weight, torch.where(mask, new, 0), gram)
    assert error["alps"] < 0.9 * error["sparsegpt"] and error["sparsegpt"] < 0.98 * error["wanda"]
    assert error["wanda"] < error["magnitude"]
    assert error["alps"] < error["admm"] < error["sparsegpt"] and error["wanda+pcg"] < error["wanda"]


def test_transposable_masks_are_chosen_better_too():
    inputs, weight, fmt = correlated_inputs(), torch.randn(32, 64), TransposableFormat(get_format("4:8"))
    stats, gram, error = stats_of(inputs), gram_of(inputs), {}
    for name in ("wanda+pcg", "admm+pcg", "alps"):
        new, mask = get_pruner(name).prune(weight, stats, fmt, None)
        assert fmt.allows(mask)
        error[name] = output_error(weight, torch.where(mask, new, 0), gram)
    assert error["alps"] < error["admm+pcg"] < 0.9 * error["wanda+pcg"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_polish_ends_at_the_least_squares(pattern, monkeypatch):
    inputs, weight, fmt = correlated_inputs(seed=1), torch.randn(24, 64), get_format(pattern)
    gram, stats = with_ridge(gram_of(inputs)), stats_of(inputs)
    old, mask = get_pruner("sparsegpt").prune(weight, stats, fmt, 0.5)
    best = least_squares(weight, mask, gram)
    smallest = output_error(weight, best, gram)

    def polished(iterations):
        monkeypatch.setattr(alps, "POLISH", iterations)
        new, new_mask = get_pruner("sparsegpt+pcg").prune(weight, stats, fmt, 0.5)
        assert torch.equal(new_mask, mask)
        return torch.where(mask, new, 0)

    errors = [output_error(weight, polished(k), gram) for k in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < output_error(weight, torch.where(mask, old, 0), gram)  # goes on from what SparseGPT left
    assert output_error(weight, polished(10), gram) < 1.01 * smallest
    assert torch.allclose(polished(200).double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["alps", "wanda+pcg"])
def test_dead_inputs_and_few_tokens(method):
    weight = torch.randn(8, 256).to(torch.bfloat16)
    inputs = [torch.randn(2, 256)]
    inputs[0][:, 8:16] = 0
    new, mask = get_pruner(method).prune(weight, stats_of(inputs), get_format("2:4"), None)
    assert bool(torch.isfinite(new).all()) and int(mask.sum()) == 8 * 128
    kept = mask[:, 8:16]
    assert torch.equal(new[:, 8:16][kept], weight[:, 8:16][kept].float())
    new, mask = get_pruner(method).prune(weight, stats_of([torch.zeros(2, 256)]), get_format("2:4"), None)
    assert torch.equal(new[mask], weight[mask].float()) and int(mask.sum()) == 8 * 128


def test_dead_inputs_are_the_first_to_go():
    weight, inputs = layer()
    weight[:, DEAD] = 100
    _, mask = get_pruner("alps").prune(weight, stats_of(inputs), get_format("unstructured"), 0.5)
    assert not mask[:, DEAD].any()


def test_nothing_pruned_is_nothing_changed():
    weight, inputs = layer()
    new, mask = get_pruner("alps").prune(weight, stats_of(inputs), get_format("unstructured"), 0.0)
    assert bool(mask.all()) and torch.allclose(new, weight, rtol=1e-3, atol=1e-4)


def test_alps_needs_calibration():
    with pytest.raises(UserError, match="needs calibration data"):
        get_pruner("alps").prune(torch.ones(1, 4), None, get_format("2:4"), None)
