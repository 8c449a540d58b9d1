"""int8 values: how far they are off, what a scale covers, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import compressed
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES, get_format
from sparse_rt.formats.int8 import (
    GROUP_SIZES,
    SCALES_NAME,
    check_data,
    check_header,
    dequantize,
    quantize,
    scales_shape,
    widen,
)

PATTERNS = ("2:4", "unstructured", "4:8", "1:4", "3:5", "16:32")
M, N = 5, 160


def group_of(pattern):
    return int(pattern.split(":")[1]) if ":" in pattern else 1


@st.composite
def cases(draw):
    """A pattern, a legal shape (columns on both sides of a group of 64), group size, sparsity, dtype, seed."""
    pattern = draw(st.sampled_from(PATTERNS))
    n = draw(st.integers(1, 280 // group_of(pattern))) * group_of(pattern)
    group_size = draw(st.sampled_from((None, *GROUP_SIZES)))
    sparsity = draw(st.sampled_from((0.0, 0.5, 0.97)))
    return pattern, draw(st.integers(1, 6)), n, group_size, sparsity, draw(st.sampled_from(VALUE_DTYPES)), draw(seeds)


seeds = st.integers(0, 2**16)


def dense_scales(scales, n, group_size):
    """The scale of every column: float64 [m, n]."""
    return scales.double().repeat_interleave(group_size or n, dim=1)[:, :n]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_value_is_the_nearest_multiple_of_the_scale_of_its_group(case):
    pattern, m, n, group_size, sparsity, dtype, seed = case
    fmt = get_format(pattern)
    values, metadata, weight = compressed(m, n, pattern, sparsity, dtype, seed)
    q, scales = quantize(fmt, values, metadata, m, n, group_size)
    assert q.dtype == torch.int8 and q.shape == values.shape and scales.dtype == torch.float32
    assert tuple(scales.shape) == scales_shape(m, n, group_size)
    check_data("w", fmt, q, scales, metadata, m, n, group_size)

    per_column = dense_scales(scales, n, group_size)
    integers = fmt.decompress(q, metadata, m, n).double()
    distance = (weight.double() - integers * per_column).abs()
    assert (distance <= per_column * (0.5 + 2**-16)).all()
    padded = torch.nn.functional.pad(weight.double().abs(), (0, per_column.shape[1] - n)).contiguous()
    for group in range(scales.shape[1]):
        columns = slice(None) if group_size is None else slice(group * group_size, (group + 1) * group_size)
        largest = padded[:, columns].amax(-1)
        torch.testing.assert_close(scales[:, group].double(), largest / 127, rtol=2**-23, atol=0)
        assert (integers[:, columns].abs().amax(-1) == torch.where(largest > 0, 127, 0)).all()

    widened = dequantize(fmt, q, scales, metadata, m, n, group_size, dtype)
    once = (fmt.decompress(q.float(), metadata, m, n) * per_column.float()).to(dtype)
    assert widened.dtype == dtype and torch.equal(fmt.decompress(widened, metadata, m, n), once)
    assert torch.equal(widened, widen("w", fmt, q, scales, metadata, m, n, group_size, dtype))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("group_size", [None, 64])
def test_what_is_counted_fast_is_what_the_mask_says(pattern, group_size):
    fmt = get_format(pattern)
    _, metadata, _ = compressed(M, N, pattern, 0.7)
    size = group_size or N
    mask = torch.nn.functional.pad(fmt.unpack_mask(metadata, M, N), (0, -N % size))
    assert torch.equal(fmt.group_counts(metadata, M, N, size), mask.view(M, -1, size).sum(-1))
    assert torch.equal(fmt.group_counts(metadata, M, N, 20), fmt.unpack_mask(metadata, M, N).view(M, -1, 20).sum(-1))


@pytest.mark.parametrize("group_size", [None, 64])
def test_rows_and_groups_without_values_have_scale_zero(group_size):
    fmt = get_format("unstructured")
    weight = torch.zeros(4, 130)
    weight[1, 3], weight[1, 70] = 5.0, -0.5
    mask = weight != 0
    mask[2, 5] = mask[2, 129] = True  # kept zeros
    values, metadata = fmt.compress(weight, mask)
    q, scales = quantize(fmt, values, metadata, 4, 130, group_size)
    assert q.tolist() == ([127, -127, 0, 0] if group_size else [127, -13, 0, 0])
    assert scales[0].eq(0).all() and scales[2].eq(0).all() and scales[3].eq(0).all()
    check_data("w", fmt, q, scales, metadata, 4, 130, group_size)
    found = fmt.decompress(dequantize(fmt, q, scales, metadata, 4, 130, group_size, torch.float32), metadata, 4, 130)
    torch.testing.assert_close(found, weight, rtol=0, atol=0.02)


def test_a_weight_that_keeps_nothing():
    fmt = get_format("unstructured")
    values, metadata = fmt.compress(torch.zeros(3, 70), torch.zeros(3, 70, dtype=torch.bool))
    q, scales = quantize(fmt, values, metadata, 3, 70, 64)
    assert q.shape == (0,) and torch.equal(scales, torch.zeros(3, 2))
    assert widen("w", fmt, q, scales, metadata, 3, 70, 64, torch.bfloat16).numel() == 0


def test_ties_are_rounded_to_even_and_the_ends_are_symmetric():
    fmt = get_format("unstructured")
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    q, scales = quantize(fmt, *fmt.compress(weight, weight != 0), 1, 7)
    assert scales.item() == 1 and q.tolist() == [127, 0, 2, 2, 0, -2, -127]


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 2.0**-126])
def test_tiny_values_stay_within_half_a_scale(largest):
    fmt = get_format("unstructured")
    weight = torch.tensor([[largest, largest / 2, -largest / 3, 1.0]])[:, :3].contiguous()
    q, scales = quantize(fmt, *fmt.compress(weight, torch.ones(1, 3, dtype=torch.bool)), 1, 3)
    assert scales.item() >= torch.finfo(torch.float32).tiny
    distance = (weight.double() - q.view(1, 3).double() * scales.double()).abs()
    assert (distance <= scales.double() * (0.5 + 2**-16)).all()


@pytest.mark.parametrize("group_size", [0, 32, 100, 512, 128.0, True, "128"])
def test_other_group_sizes_are_refused(group_size):
    values, metadata, _ = compressed(M, N, "2:4")
    with pytest.raises(UserError, match="allowed are 64, 128, 256 columns, or null for whole rows"):
        quantize(get_format("2:4"), values, metadata, M, N, group_size)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_quantized(broken):
    values, metadata, _ = compressed(M, N, "2:4")
    values[2, 3] = broken
    with pytest.raises(FormatError, match=rf"weight_values holds {broken} at position \(2, 3\)"):
        quantize(get_format("2:4"), values, metadata, M, N)


def lowest(q, scales, metadata):
    q.view(-1)[-1] = -128


def negative_scale(q, scales, metadata):
    scales[3, 1] = -1.0


def endless_scale(q, scales, metadata):
    scales[0, 2] = float("inf")


def no_scale(q, scales, metadata):
    scales[4, 0] = float("nan")


def mask(q, scales, metadata):
    metadata[2, 1] ^= 4


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lowest, r"layer.weight_values holds -128 at row 4, column 15\d; int8 values lie in -127..127"),
        (negative_scale, r"layer.weight_scale holds -1.0 at row 3, group 1; scales are finite and not negative"),
        (endless_scale, r"layer.weight_scale holds inf at row 0, group 2"),
        (no_scale, r"layer.weight_scale holds nan at row 4, group 0"),
        (mask, r"layer(.weight_meta)?(.weight_bitmask)?: "),
    ],
)
def test_damage_is_refused_by_name_and_row(pattern, damage, message):
    fmt = get_format(pattern)
    values, metadata, _ = compressed(M, N, pattern)
    q, scales = quantize(fmt, values, metadata, M, N, 64)
    damage(q, scales, metadata)
    with pytest.raises(FormatError, match=message):
        widen("layer", fmt, q, scales, metadata, M, N, 64, torch.float32)


def test_headers_are_refused_by_name():
    int8, fp32, shape = torch.int8, torch.float32, (M, 3)
    check_header("layer", (int8, fp32), shape, M, N, 64)
    check_header("layer", (int8, fp32), (M, 1), M, N, None)
    with pytest.raises(FormatError, match=r"layer.weight_values is torch.bfloat16.*needs torch.int8"):
        check_header("layer", (torch.bfloat16, fp32), shape, M, N, 64)
    with pytest.raises(FormatError, match=r"layer.weight_scale is torch.float16 .*needs torch.float32 \(5, 3\)"):
        check_header("layer", (int8, torch.float16), shape, M, N, 64)
    with pytest.raises(FormatError, match=r"layer.weight_scale .*\(5, 3\), .*scale per 128 columns needs .*\(5, 2\)"):
        check_header("layer", (int8, fp32), shape, M, N, 128)
    with pytest.raises(FormatError, match=r"layer.weight_scale .*scale per row needs .*\(5, 1\)"):
        check_header("layer", (int8, fp32), shape, M, N, None)


def test_a_product_that_does_not_fit_the_dtype_is_refused():
    fmt = get_format("2:4")
    values, metadata, _ = compressed(M, N, "2:4")
    q, scales = quantize(fmt, values, metadata, M, N)
    with pytest.raises(FormatError, match=rf"layer.weight_values \* {SCALES_NAME} as torch.float16 holds -?inf"):
        widen("layer", fmt, q, scales * 1e7, metadata, M, N, None, torch.float16)
