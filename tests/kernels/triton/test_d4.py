"""The layout d4: every bit comes back, whatever the distances; products and expansion against float64."""

import pytest
import torch

import packed_cases
from sparse_rt.errors import BackendError, FormatError
from sparse_rt.formats import get_format

pytest.importorskip("triton")
from sparse_rt.kernels.triton import d4, d4_layout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (pattern, m, n, sparsity): one column, one row, no multiple of 8 rows or 16 columns, several groups and blocks
CASES = (
    ("unstructured", 1, 1, 0.0),
    ("unstructured", 1, 4, 0.5),
    ("unstructured", 17, 60, 0.5),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 33, 130, 0.9),
    ("unstructured", 9, 700, 0.98),
    ("unstructured", 33, 130, 0.0),
    ("unstructured", 64, 256, 0.5),
    ("4:8", 17, 64, None),
    ("2:4", 33, 132, None),
)


def pack(values, metadata, pattern, m, n):
    """(sections, number of empty rows, whole body)."""
    body, empty = d4_layout.pack(get_format(pattern), values, metadata, m, n)
    return d4_layout.sections(body, m, n, values.dtype), empty, body


def packed_weight(device, case, dtype):
    w = packed_cases.weight(*case, dtype)
    return pack(w.values.to(device), w.metadata.to(device), *w.shape)[0], w.dense.to(device), w.shape


def assert_comes_back(device, bits, mask, dtype, pattern="unstructured"):
    """``bits`` [m, n] integers of the size of ``dtype``, kept where ``mask``."""
    fmt = get_format(pattern)
    m, n = mask.shape
    values, metadata = fmt.compress(bits, mask)
    values, metadata = values.view(dtype).to(device), metadata.to(device)
    body, empty = d4_layout.pack(fmt, values, metadata, m, n)
    found, found_metadata = d4_layout.unpack(fmt, body, m, n, dtype, empty)
    assert torch.equal(found_metadata, metadata)
    assert found.shape == values.shape and torch.equal(found.view(bits.dtype), values.view(bits.dtype))
    return body


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "1:16"])
def test_every_bit_comes_back(device, pattern, dtype):
    """Any bit patterns (NaN with a payload, denormals), stored zeros and -0.0, an empty and a full row."""
    integer = d4_layout.BITS[dtype.itemsize]
    for m, n in ((1, 16), (17, 80), (40, 720)):
        mask = get_format(pattern).mask_from_scores(torch.rand(m, n), 0.5)
        if pattern == "unstructured":
            mask &= torch.rand(m, 1) < torch.rand(m, n)  # from full to nearly empty rows
            mask[0], mask[-1] = True, False
        bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (m, n), dtype=integer)
        bits[torch.rand(m, n) < 0.3] = 0
        bits[torch.rand(m, n) < 0.1] = torch.iinfo(integer).min  # -0.0
        assert_comes_back(device, bits, mask, dtype, pattern)


@pytest.mark.parametrize("value", [0, 1, -(1 << 15)], ids=["+0.0", "a denormal", "-0.0"])
def test_every_distance_comes_back(device, value):
    """Distances 1 to 299, each from a slot of its own: stored zeros must not read as fillers, or the reverse."""
    m, n = 300, 640
    mask = torch.zeros(m, n, dtype=torch.bool)
    for distance in range(1, m):
        first = distance % 23
        mask[distance, :first] = True  # puts the distance at another slot of a group
        mask[distance, first::distance] = True
    body = assert_comes_back(device, torch.full((m, n), value, dtype=torch.int16), mask, torch.bfloat16)
    weight = d4_layout.sections(body, m, n, torch.bfloat16)
    assert weight.groups <= int(mask.sum()) + m, "no weight takes more than a group"


def test_zeros_at_multiples_of_the_largest_distance(device):
    """The one case in which a filler and a stored zero would look alike."""
    mask = torch.zeros(20, 900, dtype=torch.bool)
    for row in range(1, 20):
        mask[row, row % 4 :: 15 * (1 + row % 7)] = True
    for share in (0.0, 0.5, 1.0):
        bits = (torch.rand(20, 900) < share).to(torch.int16)
        assert_comes_back(device, bits, mask, torch.bfloat16)


def test_more_columns_than_16_bits_count(device):
    m, n = 3, (1 << 16) + 1000
    mask = torch.rand(m, n) < 0.002
    mask[0, -1] = mask[1, (1 << 16) - 1] = mask[2, 1 << 16] = True
    dense = torch.where(mask, torch.randn(m, n), 0.0).bfloat16()
    assert_comes_back(device, dense.view(torch.int16), mask, torch.bfloat16)
    values, metadata = (t.to(device) for t in get_format("unstructured").compress(dense, mask))
    weight = pack(values, metadata, "unstructured", m, n)[0]
    x = torch.randn(1, n).bfloat16().to(device)
    y = d4.linear(x, weight, None, m, n)
    packed_cases.assert_close(y, x.double() @ dense.double().T.to(device))


def test_weights_packed_in_parts_are_the_same(device, monkeypatch):
    w = packed_cases.weight("unstructured", 33, 130, 0.9, torch.bfloat16)
    values, metadata = w.values.to(device), w.metadata.to(device)
    whole = pack(values, metadata, *w.shape)[2]
    monkeypatch.setattr(d4_layout, "CHUNK", 5 * 130)
    assert torch.equal(pack(values, metadata, *w.shape)[2], whole)


def test_the_layout_in_words(device):
    """One row by hand: 20 weights 3 columns apart, then one 40 columns on, then one 700 on."""
    columns = [3 * i for i in range(20)] + [97, 797]
    mask = torch.zeros(1, 800, dtype=torch.bool)
    mask[0, columns] = True
    dense = torch.where(mask, torch.arange(1, 801).float(), 0.0)
    values, metadata = (t.to(device) for t in get_format("unstructured").compress(dense, mask))
    weight, empty, _ = pack(values, metadata, "unstructured", 1, 800)
    assert empty == 0 and weight.starts.tolist() == [0, 24] and weight.rows.tolist() == [0]
    used = range(0, 24, d4_layout.ROWS)  # the block has 8 rows, of which this is the first
    assert [weight.anchors[g].item() for g in used] == [0, 48, 797]
    nibbles = [[weight.gaps[g].item() >> (4 * slot) & 15 for slot in range(16)] for g in used]
    assert nibbles == [[0] + [3] * 15, [0, 3, 3, 3, 15, 15, 10] + [0] * 9, [0] * 16]
    second = weight.values[:, 8].flatten().tolist()
    assert second == [49, 52, 55, 58, 0, 0, 98] + [0] * 9
    assert not weight.values[:, 1:8].any() and not weight.gaps[1:8].any()


@pytest.mark.parametrize(
    "sparsity, dtype, most",
    [(0.5, torch.bfloat16, 2.75), (0.75, torch.bfloat16, 2.8), (0.9, torch.bfloat16, 3.6), (0.5, torch.float32, 4.75)],
)
def test_bytes_per_kept_weight(device, sparsity, dtype, most):
    """A value takes 2 or 4 of them; rows of equal length, as most ways of pruning leave them."""
    fmt = get_format("unstructured")
    scores = torch.rand(64, 2048)
    values, metadata = fmt.compress(scores.to(dtype), fmt.mask_from_scores(scores, sparsity, "row"))
    body = pack(values.to(device), metadata.to(device), "unstructured", 64, 2048)[2]
    assert body.numel() <= most * values.numel() + 1024


def test_metadata_that_contradicts_the_values_is_refused(device):
    w = packed_cases.weight("unstructured", 17, 60, 0.5, torch.bfloat16)
    for values in (w.values[:-1], torch.cat((w.values, w.values[:1]))):
        with pytest.raises(FormatError, match="marks"):
            pack(values.to(device), w.metadata.to(device), *w.shape)


def test_a_body_of_an_impossible_size_is_refused(device):
    w = packed_cases.weight("unstructured", 17, 60, 0.5, torch.bfloat16)
    body = pack(w.values.to(device), w.metadata.to(device), *w.shape)[2]
    for wrong in (body[:-16], body[:32]):
        with pytest.raises(BackendError, match=r"not a \(17, 60\) weight"):
            d4_layout.sections(wrong, 17, 60, torch.bfloat16)


# ---- products -------------------------------------------------------------------------------------------------------


def check(device, case, tokens, dtype, bias=True):
    weight, dense, (_, m, n) = packed_weight(device, case, dtype)
    x = torch.randn(tokens, n).to(device, dtype)
    bias = torch.randn(m).to(device, dtype) if bias else None
    y = d4.linear(x, weight, bias, m, n)
    assert y.dtype == dtype
    expected = x.double() @ dense.T
    packed_cases.assert_close(y, expected if bias is None else expected + bias.double(), case, tokens)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(device, case):
    for tokens in (1, 3):
        check(device, case, tokens, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(device, dtype):
    for tokens in (0, 2, 5, 17):
        check(device, ("unstructured", 17, 60, 0.5), tokens, dtype, bias=tokens % 2 == 0)


def test_a_row_longer_than_one_round_of_the_threads(device):
    check(device, ("unstructured", 9, 1100, 0.0), 2, torch.bfloat16)


def test_leading_dimensions_and_strides(device):
    weight, dense, (_, m, n) = packed_weight(device, CASES[2], torch.float32)
    whole = torch.randn(2, n + 3, 5).to(device)
    x = whole[:, 3:].transpose(1, 2)
    bias = torch.randn(2 * m).to(device)[::2]
    y = d4.linear(x, weight, bias, m, n)
    assert y.shape == (2, 5, m)
    packed_cases.assert_close(y, x.double() @ dense.T + bias.double())


@pytest.mark.parametrize("shape", [(9, 1100), (5, 8200), (2, 70000)])
def test_expand_takes_many_rounds_wide_rows_and_large_columns(device, shape):
    """More groups than a round has, other options beyond 8192 columns, anchors of four bytes beyond 65536."""
    weight, dense, (_, m, n) = packed_weight(device, ("unstructured", *shape, 0.3), torch.bfloat16)
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=device)
    assert torch.equal(d4.expand(weight, m, n, out), dense.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("blocks", "tokens", "warps"), [(128, 1, 16), (512, 4, 8), (1792, 1, 2), (1 << 20, 1, 1), (0, 1, 16), (512, 8, 4)]
)
def test_warps_fill_a_gpu_of_132_multiprocessors(blocks, tokens, warps):
    assert d4.fitting_warps(blocks, tokens, 132) == warps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expand_gives_the_dense_weight(device, case, dtype):
    weight, dense, (_, m, n) = packed_weight(device, case, dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    assert torch.equal(d4.expand(weight, m, n, out), dense.to(dtype))
