"""OWL's ratios are its equations: mean and range as asked for, counts that add up, refusals where no ratio is left."""

import pytest
import torch

from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.formats.base import num_kept
from sparse_rt.pruning import ratios


def test_outliers_are_the_scores_above_a_multiple_of_the_mean_of_the_pooled_block():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, n, generator=generator) for m, n in ((24, 64), (64, 40), (8, 16))]
    norms = [torch.rand(w.shape[1], generator=generator).square() * 9 for w in weights]
    scores = torch.cat([(w.double().abs() * x.double()).flatten() for w, x in zip(weights, norms, strict=True)])
    found = {t: ratios.outliers_percent(list(zip(weights, norms, strict=True)), t) for t in (2.0, 5.0, 50.0)}
    for threshold, percent in found.items():
        assert percent == pytest.approx(100 * float((scores > threshold * scores.mean()).double().mean()), abs=1e-9)
    assert found[2.0] > found[5.0] > 0 == found[50.0]
    assert ratios.outliers_percent([(torch.zeros(4, 4), torch.ones(4))], 5.0) == 0
    with pytest.raises(SparseRTError, match="not finite"):
        ratios.outliers_percent([(torch.ones(2, 2), torch.tensor([1.0, float("inf")]))], 5.0)


@pytest.mark.parametrize("sizes", [[100] * 5, [7, 1000, 30, 3, 250]])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_densities_have_the_mean_and_the_range_of_the_paper(sizes, sparsity):
    outliers = [1.8, 0.4, 0.7, 0.5, 0.9]
    found = ratios.owl_densities(outliers, sizes, sparsity, 0.08)
    assert sum(d * s for d, s in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(1 - sparsity, abs=1e-12)
    assert max(found) - min(found) == pytest.approx(0.16, abs=1e-12)
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=outliers.__getitem__)
    slopes = [(found[i] - found[1]) / (outliers[i] - outliers[1]) for i in (0, 2, 3, 4)]
    assert slopes == pytest.approx([slopes[0]] * 4)
    assert ratios.owl_densities([0.3] * 5, sizes, sparsity, 0.08) == pytest.approx([1 - sparsity] * 5)


def test_counts_are_near_their_ideals_and_add_up():
    assert ratios.apportion([5.2, 3.1, 3.9, 3.8], [1] * 4, 16) == [5, 3, 4, 4]
    assert ratios.apportion([2.5, 1.5, 2.0], [3, 3, 3], 18) == [3, 1, 2]  # of equal remainders the first goes up
    assert ratios.apportion([3.9999999999, 2.0], [10, 10], 60) == [4, 2]
    assert ratios.apportion([1.5, 1.5], [100, 1], 151) == [1, 2]  # 2 and 1 would be as far above as below
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(1, 50, (40,), generator=generator).tolist()
    ideal = (torch.rand(40, generator=generator, dtype=torch.float64) * 90).tolist()
    total = round(sum(i * s for i, s in zip(ideal, steps, strict=True)))
    counts = ratios.apportion(ideal, steps, total)
    assert all(abs(c - i) < 1 for c, i in zip(counts, ideal, strict=True))
    assert abs(sum(c * s for c, s in zip(counts, steps, strict=True)) - total) <= max(steps) / 2


def test_a_sparsity_keeps_exactly_what_it_was_made_for():
    for size in (1, 3, 7, 96, 4096, 4096 * 11008):
        for kept in {1, size // 3 or 1, size // 2 or 1, size - 1 or 1, size}:
            assert num_kept(size, ratios.sparsity_keeping(kept, size)) == kept


def test_a_range_without_room_is_refused_with_the_largest_that_fits():
    ratios.check_spread(0.08, 0.7)
    ratios.check_spread(0.125, 0.5, group=4)  # 1:4 to 3:4
    with pytest.raises(UserError, match=r"--owl-lambda 0.08 .* a sparsity of 0.9, at most 0.05 is possible"):
        ratios.check_spread(0.08, 0.9)
    with pytest.raises(UserError, match=r"with 2:4, at most 0.125 is possible"):
        ratios.check_spread(0.2, 0.5, group=4)
    with pytest.raises(UserError, match=r"with 1:4, there is no room for any; use --ratios uniform"):
        ratios.check_spread(0.01, 0.75, group=4)
