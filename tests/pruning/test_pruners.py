"""Every pruner keeps exactly the requested number of weights, ties included, and is the formula it claims to be."""

import itertools
import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from calibrated_layers import correlated_inputs, stats_of
from sparse_rt.config import ConvertOptions
from sparse_rt.errors import FormatError, SparseRTError, UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner, known_pruners, known_repairs

CHOOSING = ("magnitude", "wanda", "ria", "sparsegpt", "admm", "alps")
PATTERNS = ("2:4", "4:8", "1:4", "3:32", "unstructured")


def expected_count(m, n, pattern, sparsity, scope):
    if pattern != "unstructured":
        kept, group = map(int, pattern.split(":"))
        return m * n // group * kept
    return m * (n - int(n * sparsity + 1e-9)) if scope == "row" else m * n - int(m * n * sparsity + 1e-9)


def test_known_pruners():
    assert known_pruners() == ["admm", "alps", "armor", "magnitude", "none", "ria", "sparsegpt", "wanda"]
    with pytest.raises(UserError, match="Unknown pruner 'wandb'; known are admm, alps, armor, magnitude"):
        get_pruner("wandb")
    with pytest.raises(UserError, match="none removes no weight; start with a pruner"):
        get_pruner("none+admm")
    with pytest.raises(UserError, match="Unknown repair 'wandb'"):
        get_pruner("magnitude+wandb")


def test_the_help_of_method_names_them_all():
    text = ConvertOptions.model_fields["method"].description
    assert set(known_pruners()) | {f"+{name}" for name in known_repairs()} <= set(re.split("[ ,;]+", text))


@pytest.mark.parametrize(
    "pattern,sparsity", [(p, None) for p in PATTERNS[:4]] + [("unstructured", s) for s in (0.5, 0.29, 0.9)]
)
@pytest.mark.parametrize("name", CHOOSING)
def test_exact_counts_when_scores_tie(name, pattern, sparsity):
    m, n = 7, 160  # two column blocks of SparseGPT, the second one narrow
    weight = torch.randint(-1, 2, (m, n)).float()  # a third each of -1, 0 and 1
    x = torch.ones(3, 4, n) * torch.randn(3, 4, 1)  # every input alike: every score ties
    x[..., 5:9] = 0  # dead inputs
    fmt = get_format(pattern)
    new, mask = get_pruner(name).prune(weight, stats_of(list(x)), fmt, sparsity)
    scope = get_pruner(name).scope
    assert int(mask.sum()) == expected_count(m, n, pattern, sparsity, scope)
    if pattern != "unstructured":
        kept, group = map(int, pattern.split(":"))
        assert (mask.view(m, n // group, group).sum(-1) == kept).all()
    elif scope == "row":
        assert len(mask.sum(1).unique()) == 1
    values, metadata = fmt.compress(new, mask)
    fmt.check_data("w", values, metadata, m, n)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_of_equal_scores_the_lower_index_stays(name):
    weight = torch.ones(2, 8)
    stats = stats_of([torch.ones(3, 8)])
    _, mask = get_pruner(name).prune(weight, stats, get_format("2:4"), None)
    assert mask.tolist() == [[True, True, False, False] * 2] * 2
    _, mask = get_pruner(name).prune(weight, stats, get_format("unstructured"), 0.75)
    kept = [(0, 0), (0, 1), (0, 2), (0, 3)] if name == "magnitude" else [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [tuple(place) for place in mask.nonzero().tolist()] == kept


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_ranks_by_weight_times_root_mean_square_norm(pattern):
    inputs = correlated_inputs()
    weight = torch.randn(24, 64).to(torch.bfloat16)
    norms = torch.stack([x.double().square().sum(0) for x in inputs]).mean(0).sqrt()
    scores = weight.double().abs() * norms
    new, mask = get_pruner("wanda").prune(weight, stats_of(inputs), get_format(pattern), 0.6)
    assert new is weight
    group = 64 if pattern == "unstructured" else int(pattern.split(":")[1])
    keep = 64 - int(64 * 0.6) if pattern == "unstructured" else int(pattern.split(":")[0])
    best = scores.view(24, -1, group).topk(keep, dim=-1).indices
    expected = torch.zeros(24, 64 // group, group, dtype=torch.bool).scatter_(-1, best, True).view(24, 64)
    # bfloat16 weights make exact ties possible, so compare what was kept by its score.
    assert torch.allclose(scores[mask].sum(), scores[expected].sum(), rtol=1e-6)
    assert (mask != expected).sum() <= 2


def sparsegpt_reference(weight, inputs, pattern, sparsity, step=128):
    """The optimal brain surgeon, column by column in float64, eliminating columns from H^-1 instead of factorising."""
    weight = weight.double().clone()
    m, n = weight.shape
    hessian = 2 / len(inputs) * sum(x.double().T @ x.double() for x in inputs)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    rows, cost = [], []
    for j in range(n):
        rows.append(inverse[j] / inverse[j, j])
        cost.append(inverse[j, j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    cost = torch.stack(cost)
    mask = torch.zeros(m, n, dtype=torch.bool)
    for j in range(n):
        if pattern == "unstructured" and j % step == 0:
            stop = min(j + step, n)
            scores = weight[:, j:stop] ** 2 / cost[j:stop]
            keep = m * (stop - j) - (int(m * stop * sparsity + 1e-9) - int(m * j * sparsity + 1e-9))
            chosen = torch.zeros(scores.numel(), dtype=torch.bool)
            mask[:, j:stop] = chosen.scatter_(0, scores.flatten().topk(keep).indices, True).view(m, -1)
        elif pattern != "unstructured":
            kept, group = map(int, pattern.split(":"))
            if j % group == 0:
                scores = weight[:, j : j + group] ** 2 / cost[j : j + group]
                chosen = torch.zeros(m, group, dtype=torch.bool)
                mask[:, j : j + group] = chosen.scatter_(1, scores.topk(kept).indices, True)
        error = torch.where(mask[:, j], 0.0, weight[:, j])
        weight[:, j:] -= torch.outer(error, rows[j][j:])
    return weight, mask


@pytest.mark.parametrize(
    "pattern,sparsity", [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", None), ("4:8", None)]
)
def test_sparsegpt_is_the_optimal_brain_surgeon(pattern, sparsity):
    n = 160
    inputs = correlated_inputs(n=n, tokens=96)
    for x in inputs:
        x[:, 3] = 0
    weight = torch.randn(12, n)
    new, mask = get_pruner("sparsegpt").prune(weight, stats_of(inputs), get_format(pattern), sparsity)
    expected, expected_mask = sparsegpt_reference(weight, inputs, pattern, sparsity)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(new[mask].double(), expected[mask], rtol=1e-3, atol=1e-4)
    assert new.dtype == torch.float32


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_calibration_lowers_the_output_error(pattern):
    inputs = correlated_inputs(seed=3)
    weight, x = torch.randn(48, 64), torch.cat(inputs)
    error = {}
    for name in CHOOSING:
        new, mask = get_pruner(name).prune(weight, stats_of(inputs), get_format(pattern), 0.5)
        error[name] = float((x @ (weight - torch.where(mask, new, 0.0)).T).norm() / (x @ weight.T).norm())
        measured = stats_of(inputs).reconstruction_error(weight, torch.where(mask, new, 0.0))
        assert measured == pytest.approx(error[name], rel=1e-4)  # all 288 inputs fit into the sample
    assert error["sparsegpt"] < 0.9 * error["wanda"] and error["wanda"] < 0.9 * error["magnitude"]


def test_sparsegpt_survives_fewer_tokens_than_columns():
    stats = stats_of([torch.randn(4, 256)])
    new, mask = get_pruner("sparsegpt").prune(torch.randn(8, 256), stats, get_format("2:4"), None)
    assert torch.isfinite(new).all() and int(mask.sum()) == 8 * 128


def peak_bytes(function, trace):
    """What torch allocates at the worst moment of ``function()``, by its profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = torch.tensor([size for _, size in sorted(sizes)]).cumsum(0)
    return int(held.max())


@pytest.mark.parametrize(
    "name,pattern",
    [
        *itertools.product([*CHOOSING, "wanda+dsnot", "wanda+admm", "wanda+pcg"], ["2:4", "unstructured"]),
        ("armor", "2:4"),
    ],
)
@pytest.mark.parametrize("m,n", [(96, 256), (512, 192)])
def test_the_workspace_is_what_pruning_takes(m, n, name, pattern, tmp_path):
    weight, stats, pruner = torch.randn(m, n), stats_of(correlated_inputs(n=n)), get_pruner(name)
    peak = peak_bytes(lambda: pruner.prune(weight, stats, get_format(pattern), 0.5), tmp_path / "trace.json")
    assert 0.5 * pruner.workspace(m, n) < peak <= pruner.workspace(m, n) + 64 * (m + n)  # a few vectors


def test_none_takes_the_zeros_as_they_are():
    weight = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
    new, mask = get_pruner("none").prune(weight, None, get_format("2:4"), None)
    assert new is weight
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]]
    with pytest.raises(FormatError, match=r"row 0, columns 0\.\.3 hold 4 nonzeros"):
        get_pruner("none").prune(torch.ones(1, 4), None, get_format("2:4"), None)


def test_calibrated_pruners_refuse_to_guess():
    for name in ("wanda", "sparsegpt"):
        with pytest.raises(UserError, match="needs calibration data"):
            get_pruner(name).prune(torch.ones(1, 4), ActivationStats(4, gram=True), get_format("2:4"), None)
    stats = stats_of([torch.tensor([[1.0, float("inf"), 0.0, 0.0]])])
    with pytest.raises(SparseRTError, match="inputs of layers.3.q_proj are not finite"):
        stats.check_finite("layers.3.q_proj")
