"""Figures of continual learning, on tables small enough to check by hand."""

import math

import pytest

from sparse_rt.errors import UserError
from sparse_rt.training.continual import metrics, perplexity_metrics

SCORES = [
    [0.10, 0.20, 0.30],
    [0.80, 0.25, 0.35],
    [0.90, 0.70, 0.20],
    [0.60, 0.50, 0.90],
]


def test_scores():
    found = metrics(SCORES)
    assert found.acc == pytest.approx((0.6 + 0.5 + 0.9) / 3) and found.last == 0.9
    assert found.bwt == pytest.approx(((0.6 - 0.8) + (0.5 - 0.7)) / 2)
    # The best score before the last task, which need not be the one right after training.
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.7 - 0.5)) / 2)
    assert found.fwt == pytest.approx(((0.25 - 0.2) + (0.2 - 0.3)) / 2)


def test_perplexities():
    table = [[20, 40, 80], [10, 30, 90], [12, 15, 60], [15, 18, 20]]
    found = perplexity_metrics(table)
    assert found.acc == pytest.approx(math.exp(math.log(15 * 18 * 20) / 3)) and found.last == 20
    assert found.bwt == pytest.approx(((10 - 15) / 10 + (15 - 18) / 15) / 2)
    assert found.forgetting == pytest.approx((0.5 + 0.2) / 2)
    assert found.fwt == pytest.approx(((40 - 30) / 40 + (80 - 60) / 80) / 2)


def test_nothing_learned_is_nothing_forgotten():
    found = perplexity_metrics([[7.0, 9.0]] * 3)
    assert (found.bwt, found.forgetting, found.fwt) == (0, 0, 0)


@pytest.mark.parametrize("table", [[[1.0]], [[1.0, 2.0]] * 2, [[1.0, 2.0], [1.0], [1.0, 2.0]], [[1.0], [1.0]]])
def test_a_table_of_another_shape_is_refused(table):
    with pytest.raises(UserError, match=r"N \+ 1 rows of N scores"):
        metrics(table)


def test_perplexities_below_one_are_refused():
    with pytest.raises(UserError, match="from 1 on"):
        perplexity_metrics([[math.nan, 2.0]] * 3)
