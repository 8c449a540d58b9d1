"""Transposable masks keep N in every row and column of every block, always, and nearly the best sum there is."""

import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack

from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, get_pruner
from sparse_rt.pruning.transposable import TransposableFormat, is_transposable, transposable_mask

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (1, 8), (7, 8), (3, 7), (16, 32)]


def counts(mask, group):
    """How many every row and every column of every block keeps, counted one by one."""
    m, n = mask.shape
    blocks = [mask[i : i + group, j : j + group] for i in range(0, m, group) for j in range(0, n, group)]
    return {int(line.sum()) for block in blocks for line in (*block, *block.T)}


def best_sum(scores, kept):
    """The optimum of one block by linear programming: its polytope has whole-numbered corners."""
    group = len(scores)
    ones = torch.ones(1, group).numpy()
    sums = vstack([kron(eye_array(group), ones), kron(ones, eye_array(group))])
    limits = [kept] * (2 * group)
    return -linprog(-scores.double().flatten().numpy(), A_eq=sums, b_eq=limits, bounds=(0, 1), method="highs").fun


def scores_of(kind, m, n, generator):
    normal = torch.randn(m, n, generator=generator)
    return {
        "normal": normal.abs(),
        "heavy": normal**4 * torch.rand(n, generator=generator) ** 4 * 1e6,
        "signed": normal,
        "ties": torch.randint(0, 2, (m, n), generator=generator).float(),
        "equal": torch.full((m, n), 3.0),
        "zero": torch.zeros(m, n),
        "one column": torch.zeros(m, n).index_fill_(1, torch.tensor([1]), 1.0),
        "one row": torch.zeros(m, n).index_fill_(0, torch.tensor([1]), 1.0),
        "not finite": normal.masked_fill(normal > 1, float("inf")).masked_fill(normal < -1, float("nan")),
        "half": normal.abs().to(torch.float16),
    }[kind]


@pytest.mark.parametrize("kept, group", PATTERNS)
def test_every_row_and_column_of_every_block_keeps_n(kept, group):
    generator = torch.Generator().manual_seed(group * 100 + kept)
    kinds = ("normal", "heavy", "signed", "ties", "equal", "zero", "one column", "one row", "not finite", "half")
    for kind in kinds:
        scores = scores_of(kind, 3 * group, 5 * group, generator)
        mask = transposable_mask(scores, kept, group)
        assert counts(mask, group) == {kept}, kind
        assert is_transposable(mask, kept, group) and is_transposable(mask.T, kept, group)
        assert torch.equal(mask, transposable_mask(scores, kept, group))


def test_rounding_that_leaves_rows_short_is_completed():
    """Many random blocks with ties: greedy rounding gets stuck in a good part of them."""
    generator = torch.Generator().manual_seed(3)
    for kept, group in ((3, 6), (2, 5), (5, 9)):
        scores = torch.randint(0, 4, (group * 20, group * 60), generator=generator).float()
        assert counts(transposable_mask(scores, kept, group), group) == {kept}


@pytest.mark.parametrize("kept, group", PATTERNS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_sum_is_nearly_the_best(kept, group, kind):
    generator = torch.Generator().manual_seed(7)
    m, n = (2 * group, 2 * group) if group == 32 else (3 * group, 4 * group)
    scores = scores_of(kind, m, n, generator)
    kept_sum = (scores * transposable_mask(scores, kept, group)).double().sum()
    blocks = scores.view(m // group, group, n // group, group).transpose(1, 2).reshape(-1, group, group)
    best = sum(best_sum(block, kept) for block in blocks)
    assert (1.0 if group == 4 else 0.995) * best <= kept_sum * (1 + 1e-6) and kept_sum <= best * (1 + 1e-6)


def test_is_transposable_sees_a_single_wrong_place():
    mask = transposable_mask(torch.rand(16, 16), 4, 8)
    row = int(mask[:, 0].nonzero()[0])
    other = int((~mask[row, :8]).nonzero()[0])
    mask[row, 0], mask[row, other] = False, True
    assert counts(mask.view(16, 2, 8).sum(-1, keepdim=True).view(16, 2), 1) == {4}  # rows are fine
    assert not is_transposable(mask, 4, 8) and not is_transposable(mask[:12], 4, 8)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "alps", "admm", "wanda+admm"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_pruner_chooses_them_through_the_format(method, pattern):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(3, 40, 64, generator=generator)
    stats = ActivationStats(64, gram=True, expected_sequences=3)
    for sequence in x:
        stats.add(sequence)
    plain = get_format(pattern)
    new, mask = get_pruner(method).prune(weight, stats, TransposableFormat(plain), None)
    assert counts(mask, plain.group) == {plain.group // 2} and torch.isfinite(new[mask]).all()
    values, metadata = plain.compress(new, mask)
    plain.check_data("w", values, metadata, 48, 64)
    _, free = get_pruner(method).prune(weight, stats, plain, None)
    assert not is_transposable(free, plain.group // 2, plain.group)


def test_the_format_is_the_plain_one_but_for_the_choice():
    for pattern in ("2:4", "4:8"):
        plain = get_format(pattern)
        fmt = TransposableFormat(plain)
        assert fmt == plain and fmt.tensor_names == plain.tensor_names and fmt.default_sparsity == 0.5
        weight = torch.randn(16, 24)
        mask = fmt.mask_from_scores(weight.abs())
        values, metadata = fmt.compress(weight, mask)
        assert all(torch.equal(a, b) for a, b in zip(plain.compress(weight, mask), (values, metadata), strict=True))
        assert torch.equal(fmt.decompress(values, metadata, 16, 24), weight * mask)
        assert torch.equal(fmt.mask_of(weight * mask), mask)
        assert fmt.refuse_shape(18, 24) == f"18 rows are not a multiple of {plain.group}, as a transposable mask needs"
        assert fmt.refuse_shape(16, 26) == plain.refuse_shape(16, 26)
    with pytest.raises(ValueError, match="unstructured has no groups"):
        TransposableFormat(get_format("unstructured"))
