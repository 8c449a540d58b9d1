"""Properties that every format must have, and what each pattern makes of odd input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import random_weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES, get_format, is_pattern, known_patterns, normalize_zeros, positions

PATTERNS = ("2:4", "unstructured", "4:8", "1:4", "3:5", "16:32")


def group_of(pattern: str) -> int:
    return int(pattern.split(":")[1]) if ":" in pattern else 1


@st.composite
def cases(draw):
    """A pattern, a legal shape and a seed."""
    pattern = draw(st.sampled_from(PATTERNS))
    m = draw(st.integers(1, 9))
    n = draw(st.integers(1, 12)) * group_of(pattern)
    return pattern, m, n, draw(st.integers(0, 2**16)), draw(st.sampled_from((0.0, 0.3, 0.5, 0.9)))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(VALUE_DTYPES))
def test_round_trip_is_bit_exact_and_sizes_are_as_announced(case, dtype):
    pattern, m, n, seed, sparsity = case
    fmt = get_format(pattern)
    weight = random_weight(m, n, pattern, sparsity, dtype, seed)
    mask = fmt.mask_of(weight)
    values, metadata = fmt.compress(weight, mask)
    assert torch.equal(fmt.decompress(values, metadata, m, n), weight)
    assert torch.equal(fmt.unpack_mask(metadata, m, n), mask)
    assert values.dtype == dtype and metadata.dtype == torch.uint8
    assert tuple(values.shape) == fmt.values_shape(m, n, values.numel())
    assert tuple(metadata.shape) == fmt.metadata_shape(m, n)
    assert fmt.num_values(metadata, m, n) == values.numel() == int(mask.sum())
    fmt.check_header("w", values.shape, metadata.shape, m, n)
    fmt.check_data("w", values, metadata, m, n)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_slices_and_joins_equal_those_of_the_dense_weight(case, data):
    pattern, m, n, seed, sparsity = case
    fmt = get_format(pattern)
    weight = random_weight(m, n, pattern, sparsity, torch.float32, seed)
    packed = fmt.compress(weight, fmt.mask_of(weight))
    start = data.draw(st.integers(0, m))
    stop = data.draw(st.integers(start, m))
    rows = fmt.select_rows(*packed, m, n, start, stop)
    assert torch.equal(fmt.decompress(*rows, stop - start, n), weight[start:stop])
    rest = fmt.select_rows(*packed, m, n, stop, m)
    joined = fmt.concat_rows([(*rows, stop - start), (*rest, m - stop)], n)
    assert torch.equal(fmt.decompress(*joined, m - start, n), weight[start:])
    group = group_of(pattern)
    left = data.draw(st.integers(0, n // group)) * group
    right = data.draw(st.integers(left // group, n // group)) * group
    columns = fmt.select_columns(*packed, m, n, left, right)
    assert torch.equal(fmt.decompress(*columns, m, right - left), weight[:, left:right])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_positions_address_the_values_in_storage_order(case):
    pattern, m, n, seed, sparsity = case
    fmt = get_format(pattern)
    weight = random_weight(m, n, pattern, sparsity, torch.float32, seed)
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    rows, columns = positions(fmt, metadata, m, n)
    assert torch.equal(weight[rows.long(), columns.long()], values.flatten())


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_unstructured_keeps_exactly_the_requested_count_when_all_scores_tie(scope, sparsity):
    fmt = get_format("unstructured")
    mask = fmt.mask_from_scores(torch.ones(10, 100), sparsity, scope)
    assert int(mask.sum()) == 1000 - round(1000 * sparsity)
    if scope == "row":
        assert (mask.sum(1) == 100 - round(100 * sparsity)).all()
    flat = mask[0] if scope == "row" else mask.flatten()
    assert flat[: int(flat.sum())].all(), "of equal scores the lower index wins"


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_group_patterns_keep_the_highest_scores_of_each_group(pattern):
    kept, group = (int(part) for part in pattern.split(":"))
    scores = torch.randn(7, 4 * group).abs()
    mask = get_format(pattern).mask_from_scores(scores).view(7, 4, group)
    scores = scores.view(7, 4, group)
    assert (mask.sum(-1) == kept).all()
    lowest_kept = scores.masked_fill(~mask, torch.inf).amin(-1)
    highest_dropped = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (lowest_kept >= highest_dropped).all()


def test_explicit_zeros_stay_stored_and_short_groups_take_the_lowest_free_columns():
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    fmt = get_format("2:4")
    mask = fmt.mask_of(weight)
    assert mask.tolist() == [[True, False, False, True, True, True, False, False]]
    values, metadata = fmt.compress(weight, mask)
    assert values.tolist() == [[0.0, 5.0, 0.0, 0.0]]
    values[0, 0] = -0.0
    again = fmt.decompress(values, metadata, 1, 8)
    assert torch.equal(fmt.unpack_mask(metadata, 1, 8), mask) and torch.signbit(again[0, 0])


def test_negative_zero_counts_as_zero_before_a_mask_is_chosen():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]])
    cleaned = normalize_zeros(weight)
    assert not torch.signbit(cleaned).any() and torch.equal(cleaned, weight)
    assert get_format("unstructured").mask_of(cleaned).tolist() == [[False, True, False, True]]


def test_a_weight_with_too_many_nonzeros_is_refused_with_its_place():
    weight = torch.zeros(3, 16)
    weight[1, 4:7] = 1
    with pytest.raises(FormatError, match=r"row 1, columns 4\.\.7 hold 3 nonzeros.*2:4 allows 2"):
        get_format("2:4").mask_of(weight)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_columns_that_are_no_multiple_of_the_group_are_refused(pattern):
    fmt = get_format(pattern)
    assert f"multiple of {group_of(pattern)}" in fmt.refuse_shape(4, 30)
    with pytest.raises(UserError, match="cannot cut columns"):
        weight = random_weight(2, 32, pattern)
        fmt.select_columns(*fmt.compress(weight, fmt.mask_of(weight)), 2, 32, 2, 16)


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4", "1:1000", "structured", "2:4 ", "", "2-4"])
def test_unknown_patterns_are_refused_with_what_is_allowed(pattern):
    with pytest.raises(UserError, match=r"allowed are|need 0 < N < M"):
        get_format(pattern)


def test_a_pattern_that_yaml_turned_into_a_number_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="in quotes"):
        get_format(124)
    assert is_pattern("2:4") and not is_pattern("two") and known_patterns() == ["2:4", "unstructured", "N:M"]


def test_wrong_sizes_are_refused_by_name_and_both_shapes():
    fmt = get_format("2:4")
    with pytest.raises(FormatError, match=r"w.weight_meta has shape \(8, 3\).*needs \(8, 2\)"):
        fmt.check_header("w", (8, 8), (8, 3), 8, 16)
    with pytest.raises(FormatError, match=r"w.weight_values has shape \(8, 7\).*needs \(8, 8\)"):
        fmt.check_header("w", (8, 7), (8, 2), 8, 16)
    with pytest.raises(FormatError, match="weight_values"):
        get_format("unstructured").check_header("w", (8 * 16 + 1,), (8, 2), 8, 16)
    with pytest.raises(FormatError, match="weight_values"):
        get_format("4:8").check_header("w", (64,), (8, 2), 8, 16)


def corrupt_nibble(values, metadata):
    metadata[2, 1] = 0b0000_0101  # first == second == 1


def corrupt_popcount(values, metadata):
    metadata[1, 0] ^= 1


def corrupt_padding(values, metadata):
    metadata[0, -1] |= 0x80


def corrupt_value(values, metadata):
    values.flatten()[3] = float("nan")


@pytest.mark.parametrize(
    ("pattern", "n", "corrupt", "message"),
    [
        ("2:4", 16, corrupt_nibble, "weight_meta: row 2, group 2 keeps columns 1 and 1"),
        ("2:4", 12, corrupt_padding, "weight_meta: padding bits of row 0"),
        ("2:4", 16, corrupt_value, "weight_values holds nan at position"),
        ("unstructured", 13, corrupt_popcount, "weight_bitmask marks"),
        ("unstructured", 13, corrupt_padding, "weight_bitmask: padding bits of row 0"),
        ("unstructured", 13, corrupt_value, "weight_values holds nan"),
        ("4:8", 16, corrupt_popcount, r"row 1, group 0 keeps [35] weights"),
        ("3:5", 10, corrupt_padding, "weight_bitmask: padding bits of row 0"),
    ],
)
def test_every_corruption_is_refused_by_name(pattern, n, corrupt, message):
    fmt = get_format(pattern)
    weight = random_weight(4, n, pattern)
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    fmt.check_data("layer", values, metadata, 4, n)
    corrupt(values, metadata)
    with pytest.raises(FormatError, match=message):
        fmt.check_data("layer", values, metadata, 4, n)
