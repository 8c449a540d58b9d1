"""ARMOR against its own problem, solved directly in float64 with general least squares."""

import itertools

import pytest
import torch

from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner
from sparse_rt.pruning.armor import factorize

M, N, A, B = 16, 32, 4, 8


def problem(m=M, n=N, seed=0):
    """(weight, importance): rows and columns of unlike size, some inputs loud."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator)
    importance = torch.rand(n, generator=generator) + 0.1
    importance[:: n // 4] *= 8
    return weight, importance


def stats_of(x):
    stats = ActivationStats(x.shape[-1], expected_sequences=1)
    stats.add(x)
    return stats


def proxy_loss(weight, importance, out, core, inner):
    product = torch.block_diag(*out.double()) @ core.double() @ torch.block_diag(*inner.double())
    return float(((weight.double() - product).square() * importance.double()).sum())


def normalised(weight):
    weight = weight.double()
    columns = weight.norm(dim=0)
    rows = (weight / columns).norm(dim=1)
    return weight / columns / rows[:, None], columns, rows


def nowag(weight, importance, pattern):
    """The mask of NoWag-P: of every M columns the N of the largest d V^2."""
    kept, group = map(int, pattern.split(":"))
    scores = (weight.double().square() * importance.double()).view(-1, group)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(kept, dim=1).indices, True)
    return mask.view(weight.shape)


def least_squares(columns, target):
    """The shortest of the best, where there are several."""
    return torch.linalg.lstsq(columns, target, driver="gelsd").solution


def direct_round(weight, importance, out, core, inner, pattern):
    """A, then B, then every group in turn, each the best with all else fixed: dense matrices in float64.

    Of equally good ones A and B change least.
    """
    m, n = weight.shape
    kept, group = map(int, pattern.split(":"))
    root = importance.double().sqrt()
    weight = weight.double() * root
    for start in range(0, m, A):  # rows of A: W_r D^(1/2) = A_r (S B D^(1/2))
        rows = slice(start, start + A)
        right = core[rows] @ inner * root
        missing = weight[rows] - out[rows, rows] @ right
        out[rows, rows] += least_squares(right.T, missing.T).T
    for start in range(0, n, B):
        columns = slice(start, start + B)
        left = (out @ core)[:, columns]
        missing = weight[:, columns] / root[columns] - left @ inner[columns, columns]
        inner[columns, columns] += least_squares(left, missing)
    mask = torch.zeros(m, n, dtype=torch.bool)
    for row, start in itertools.product(range(m), range(0, n, group)):
        core[row, start : start + group] = 0
        missing = (weight - out @ core @ inner * root).flatten()
        choices = list(itertools.combinations(range(start, start + group), kept))
        effects = {c: torch.outer(out[:, row], inner[c] * root).flatten() for c in range(start, start + group)}
        effects = torch.stack([torch.stack([effects[c] for c in choice], dim=1) for choice in choices])
        touched = effects.abs().sum((0, 2)) > 0
        effects, missing = effects[:, touched], missing[touched]
        values = least_squares(effects, missing.expand(len(choices), -1)[..., None])
        best = int((missing - (effects @ values)[..., 0]).square().sum(-1).argmin())
        core[row, list(choices[best])], mask[row, list(choices[best])] = values[best, :, 0], True
    return out, core, mask, inner


@pytest.mark.parametrize("pattern,rounds", [("2:4", 1), ("2:4", 2), ("1:4", 2), ("4:8", 1)])
def test_a_round_is_the_best_of_each_factor_in_turn(pattern, rounds):
    weight, importance = problem()
    found = factorize(weight, importance, get_format(pattern), A, B, rounds=rounds, least_gain=0)
    core = torch.where(nowag(weight, importance, pattern), weight, 0.0).double()
    out, inner = torch.eye(M, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    for _ in range(rounds):
        out, core, mask, inner = direct_round(weight, importance, out, core, inner, pattern)
    assert torch.equal(found.mask, mask) and torch.equal(found.core != 0, mask)
    for mine, theirs in (
        (torch.block_diag(*found.out), out),
        (found.core, core),
        (torch.block_diag(*found.inner), inner),
    ):
        assert torch.allclose(mine.double(), theirs, rtol=2e-3, atol=2e-3)
    assert len(found.losses) == rounds + 1


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("a,b", [(1, 8), (4, 8), (12, 16)])
def test_the_loss_starts_with_nowag_and_only_falls(pattern, a, b):
    weight, importance = problem(48, 64, seed=1)
    found = factorize(weight, importance, get_format(pattern), a, b, rounds=8, least_gain=0)
    start = ((weight.double().square() * importance.double())[~nowag(weight, importance, pattern)]).sum()
    assert found.losses[0] == pytest.approx(float(start), rel=1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(found.losses)) and len(found.losses) == 9
    loss = proxy_loss(weight, importance, found.out, torch.where(found.mask, found.core, 0.0), found.inner)
    assert found.losses[-1] == pytest.approx(loss, rel=1e-4)
    assert loss < 0.9 * float(start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_pruned_weight_is_nearer_to_the_dense_one_than_nowag(pattern, dtype):
    weight, importance = problem(32, 64, seed=2)
    weight, x = weight.to(dtype), torch.randn(200, 64) * importance.sqrt()
    pruner = get_pruner("armor")
    pruner.block, pruner.rounds = 8, 6
    core, mask, wrapper = pruner.prune(weight, stats_of(x), get_format(pattern), None)
    kept, group = map(int, pattern.split(":"))
    assert (mask.view(-1, group).sum(-1) == kept).all()
    found = wrapper.dense(torch.where(mask, core, 0.0)).double()
    flat, columns, rows = normalised(weight)
    loss = proxy_loss(
        flat, x.square().mean(0), torch.eye(32)[None], found / columns / rows[:, None], torch.eye(64)[None]
    )
    start = (flat.square() * x.double().square().mean(0))[~nowag(flat, x.square().mean(0), pattern)].sum()
    assert loss < 0.8 * float(start)
    # and the outputs of the layer with it
    plain = torch.where(nowag(flat, x.square().mean(0), pattern), weight.double(), 0.0)
    assert (x.double() @ (found - weight).T).norm() < (x.double() @ (plain - weight).T).norm()


def test_a_weight_that_obeys_the_pattern_stays_what_it_is():
    weight, _ = problem(16, 32)
    weight = torch.where(get_format("2:4").mask_from_scores(weight.abs()), weight, 0.0)
    core, mask, wrapper = get_pruner("armor").prune(weight, stats_of(torch.randn(9, 32)), get_format("2:4"), None)
    assert torch.equal(mask, weight != 0)
    assert torch.allclose(wrapper.dense(torch.where(mask, core, 0.0)), weight, rtol=1e-5, atol=1e-7)


def test_dead_inputs_zero_rows_and_ties_leave_finite_weights_and_exact_counts():
    weight = torch.randint(-1, 2, (12, 32)).float()
    weight[3], weight[:, 9], weight[:, 16:20] = 0, 0, 0
    x = torch.ones(20, 32)
    x[:, [0, 1, 2, 3, 11]] = 0
    pruner = get_pruner("armor")
    pruner.block, pruner.rounds = 4, 6
    core, mask, wrapper = pruner.prune(weight, stats_of(x), get_format("2:4"), None)
    assert (mask.view(-1, 4).sum(-1) == 2).all()
    found = wrapper.dense(torch.where(mask, core, 0.0))
    assert torch.isfinite(found).all() and (found[3] == 0).all()
    assert (x @ (found - weight).T).norm() < (x @ weight.T).norm()
    again = pruner.prune(weight, stats_of(x), get_format("2:4"), None)
    assert torch.equal(again.weight, core) and torch.equal(again.wrapper.inner, wrapper.inner)
    nothing = pruner.prune(torch.zeros(8, 16), stats_of(torch.ones(4, 16)), get_format("2:4"), None)
    assert (nothing.wrapper.dense(torch.where(nothing.mask, nothing.weight, 0.0)) == 0).all()
    assert nothing.mask.view(-1, 4).tolist() == [[True, True, False, False]] * 32


@pytest.mark.parametrize(
    "m,n,pattern,block,expected",
    [
        (4096, 4096, "2:4", None, (128, 128)),  # the blocks of the paper
        (11008, 4096, "2:4", None, (128, 128)),
        (704, 256, "2:4", None, (8, 8)),
        (65536, 65536, "2:4", None, (128, 128)),
        (64, 64, "4:8", None, (2, 8)),  # whole groups of columns
        (36, 100, "2:4", 16, (12, 4)),  # divisors
        (7, 12, "2:4", 100, (7, 12)),
    ],
)
def test_block_sizes(m, n, pattern, block, expected):
    pruner = get_pruner("armor")
    pruner.block = block
    assert pruner.blocks(m, n, get_format(pattern)) == expected


def test_what_it_cannot_do():
    pruner = get_pruner("armor")
    for pattern in ("unstructured", "16:32"):
        assert "it tries every choice of N in M columns" in pruner.refuse_pattern(get_format(pattern))
    assert pruner.refuse_pattern(get_format("2:4")) is pruner.refuse_pattern(get_format("4:8")) is None
    with pytest.raises(UserError, match="needs calibration data"):
        pruner.prune(torch.ones(4, 4), None, get_format("2:4"), None)
    with pytest.raises(UserError, match="product of three matrices, which no repair knows; use armor alone"):
        get_pruner("armor+dsnot")
