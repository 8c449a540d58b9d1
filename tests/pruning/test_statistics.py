"""The sample that a linear's statistics keep of its inputs: which rows, how many, and how it is put together."""

import pytest
import torch

from sparse_rt.pruning import ActivationStats
from sparse_rt.pruning.statistics import SAMPLE_ROWS


def sequences(count, tokens=40, n=6):
    return [torch.randn(1, tokens, n) for _ in range(count)]


def fed(inputs, expected):
    stats = ActivationStats(inputs[0].shape[-1], expected_sequences=expected)
    for x in inputs:
        stats.add(x)
    return stats


@pytest.mark.parametrize("count", [1, 7, 64, SAMPLE_ROWS, 3 * SAMPLE_ROWS])
def test_the_sample_is_spread_over_the_expected_sequences(count):
    inputs = sequences(count)
    each = -(-SAMPLE_ROWS // count)
    step = max(1, 40 // each)
    assert torch.equal(fed(inputs, count).sample(), torch.cat([x[0, ::step][:each] for x in inputs]))


def test_more_sequences_than_expected_are_kept_too():
    inputs = sequences(50)
    assert torch.equal(fed(inputs, 1).sample(), torch.cat([x[0] for x in inputs]))


def test_room_is_taken_for_a_sample_not_for_what_is_expected():
    stats = ActivationStats(1000, expected_sequences=10**6)
    assert stats._sample.nbytes <= 2 * SAMPLE_ROWS * 1000 * 4


def test_samples_of_several_processes_and_a_permutation():
    inputs = sequences(6)
    parts = [fed(inputs[start::2], 6) for start in range(2)]
    samples = [part.sample().clone() for part in parts]
    parts[0].take_over(6, 240, samples)
    assert torch.equal(parts[0].sample(), torch.cat(samples)) and parts[0].sequences == 6
    order = torch.tensor([5, 0, 3, 1, 2, 4])
    parts[0].permute(order)
    assert torch.equal(parts[0].sample(), torch.cat(samples)[:, order])
    parts[0].add(inputs[0])
    assert torch.equal(parts[0].sample()[-40:], inputs[0][0])
