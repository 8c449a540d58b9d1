"""Exactly as many are kept as asked for, the lower index of equals, whatever the size of a row."""

import pytest
import torch

from sparse_rt.errors import FormatError
from sparse_rt.formats import check_finite, get_format, normalize_zeros
from sparse_rt.formats.selection import PIECE, keep_highest


def by_sorting(scores, keep):
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(PIECE + 1000,), (3, PIECE // 2 + 7), (700, 1000), (999, 2, 4), (40_000, 16)])
def test_as_sorting_does(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(shape, generator=generator, dtype=dtype)
    coarse = (fine * 2).round()  # a handful of values, -0.0 beside 0.0: ties everywhere
    for scores in (fine, coarse, coarse.abs(), -fine.abs()):
        for keep in (1, shape[-1] // 2, shape[-1] - 1):
            assert torch.equal(keep_highest(scores, keep), by_sorting(scores, keep))


def test_infinite_scores_are_highest_and_lowest():
    scores = torch.randn(PIECE + 5)
    scores[[7, PIECE + 1]], scores[[0, PIECE + 4]] = torch.inf, -torch.inf
    assert keep_highest(scores, 2).nonzero().flatten().tolist() == [7, PIECE + 1]
    assert (~keep_highest(scores, PIECE + 3)).nonzero().flatten().tolist() == [0, PIECE + 4]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "4:16", "3:5", "unstructured"])
def test_weights_of_several_pieces(pattern):
    fmt = get_format(pattern)
    weight = torch.randn(PIECE // 500, 1200).to(torch.bfloat16)
    mask = fmt.mask_from_scores(weight.float().abs(), 0.6)
    pruned = torch.where(mask, weight, 0)
    values, metadata = fmt.compress(pruned, fmt.mask_of(pruned))
    assert torch.equal(values.flatten(), weight[mask]) and torch.equal(fmt.unpack_mask(metadata, *weight.shape), mask)
    last = weight.shape[0] - 1
    pruned[last] = 1
    if fmt.group:
        with pytest.raises(FormatError, match=rf"row {last}, columns 0\.\.{fmt.group - 1} hold {fmt.group} nonzeros"):
            fmt.mask_of(pruned)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_the_first_number_that_is_not_finite_is_named(value):
    weight = torch.randn(PIECE // 500, 1200).to(torch.bfloat16)
    check_finite("w", weight)
    weight[200, 3] = weight[201, 2] = value
    with pytest.raises(FormatError, match=r"w holds -?(inf|nan) at position \(200, 3\)"):
        check_finite("w", weight)


def test_zeros_become_positive_wherever_they_are():
    weight = torch.randn(PIECE // 500, 1200).to(torch.bfloat16)
    weight[::3] = 0
    assert normalize_zeros(weight) is weight
    weight[-1, -1] = -0.0
    cleaned = normalize_zeros(weight)
    assert torch.equal(cleaned, weight) and not cleaned.signbit()[weight == 0].any() and weight.signbit()[-1, -1]
