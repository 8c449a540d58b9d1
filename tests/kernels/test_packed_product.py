"""The product with a packed weight equals float64 on every instruction set, layout, dtype, sparsity and number of
tokens, and for every kind of view."""

import itertools
import random

import pytest
import torch

from packed_cases import assert_close, layouts, patchy, shifted, weight
from sparse_rt.kernels import packed
from sparse_rt.kernels.native.packed import DTYPES

TOKENS = (1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 23, 24, 25, 64, 100)
# One row, one column; around the 16 rows of a panel and the 64 of four; around windows of 64 and 128 columns.
SHAPES = (
    *((1, 1), (1, 300), (5, 3), (3, 7), (16, 2), (15, 12), (17, 33), (64, 128), (63, 72), (65, 129), (31, 200)),
    *((48, 1000), (20, 4097), (130, 132)),
)
CASES = (
    *(("unstructured", sparsity) for sparsity in (0.0, 0.5, 0.75, 0.9, 1.0)),
    *((pattern, None) for pattern in ("2:4", "4:8", "1:4", "2:8")),
)


def shapes(pattern):
    group = 1 if pattern == "unstructured" else int(pattern.partition(":")[2])
    rounded = ((m, max(group, n // group * group)) for m, n in SHAPES)
    return dict.fromkeys(rounded)


def product(x, w, tensor, bias=None):
    return packed.packed_linear(x, tensor, bias, *w.shape[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern, sparsity", CASES)
def test_equals_float64(isa, pattern, sparsity, dtype):
    for m, n in shapes(pattern):
        w = weight(pattern, m, n, sparsity, dtype)
        x, bias = torch.randn(max(TOKENS), n).to(dtype), torch.randn(m).to(dtype)
        plain = x.double() @ w.dense.T
        for layout in layouts(pattern, dtype):
            tensor = w.pack(layout)
            for tokens, b in itertools.product(TOKENS, (None, bias)):
                y = product(x[:tokens], w, tensor, b)
                expected = plain[:tokens] if b is None else plain[:tokens] + b.double()
                assert y.dtype == dtype
                assert_close(y, expected, layout, (m, n), f"{tokens} tokens, bias {b is not None}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_columns_in_a_sparse_weight(isa, dtype):
    w = patchy(40, 1000, dtype)
    x = torch.randn(4, 1000).to(dtype)
    for layout, tokens in itertools.product(layouts("unstructured", dtype), (1, 2, 3, 4)):
        assert_close(product(x[:tokens], w, w.pack(layout)), x[:tokens].double() @ w.dense.T, layout, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("n, tokens", [(14336, 61), (14340, 7), (1100, 300), (20, 600)])
def test_many_tokens_and_wide_rows(isa, threads, pattern, n, tokens, dtype):
    """x is cut into parts that stay in the cache, and the weight is expanded a part at a time for each of them."""
    w = weight(pattern, 33, n, 0.75, dtype)
    x = torch.randn(tokens, n).to(dtype)
    expected = x.double() @ w.dense.T
    for layout, count in itertools.product(layouts(pattern, dtype), (1, 2)):
        threads(count)
        assert_close(product(x, w, w.pack(layout)), expected, layout, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_views_of_every_kind(isa, pattern, dtype):
    """Leading dimensions, strides, addresses that are multiples of the element size only, no tokens at all."""
    w = weight(pattern, 37, 132, 0.75, dtype)
    base, bias = torch.randn(2, 3, 5, 132).to(dtype), torch.randn(37).to(dtype)
    wide = torch.randn(7, 2 * 132).to(dtype)
    views = {
        "four dimensions": base,
        "one dimension": base[1, 2, 3],
        "transposed": base.transpose(0, 2),
        "every second column": wide[:, ::2],
        "columns of a wider tensor": wide[:, 3:135],
        "column major": torch.randn(132, 6).to(dtype).T,
        "one row repeated": base[0, 0, :1].expand(9, 132),
        "rows backwards": base.flatten(0, 2)[torch.arange(29, -1, -1)],
        "unaligned": shifted(base[0, 0]),
        "no tokens": base[:0],
        "no tokens in the middle": base[:, :0],
    }
    for layout in layouts(pattern, dtype):
        tensor = w.pack(layout)
        for name, x in views.items():
            y = product(x, w, tensor, bias)
            assert y.shape == (*x.shape[:-1], 37) and y.is_contiguous(), name
            assert_close(y, x.double() @ w.dense.T + bias.double(), layout, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_weights_and_biases_at_odd_addresses_or_with_strides(isa, pattern, dtype):
    w = weight(pattern, 37, 132, 0.75, dtype)
    x, bias = torch.randn(5, 132).to(dtype), torch.randn(37).to(dtype)
    for layout in layouts(pattern, dtype):
        tensor = w.pack(layout)
        expected = product(x, w, tensor, bias)
        again = packed.pack(shifted(w.values), shifted(w.metadata), *w.shape, layout)
        assert torch.equal(product(x, w, again, shifted(bias)), expected)
        assert torch.equal(product(x, w, shifted(tensor), torch.stack((bias, bias), 1)[:, 0]), expected)
        values, metadata = packed.unpack(shifted(tensor), *w.shape)
        assert torch.equal(values, w.values) and torch.equal(metadata, w.metadata)


def test_a_bias_of_another_dtype_is_rounded_to_that_of_x(isa):
    w = weight("unstructured", 37, 132, 0.5, torch.bfloat16)
    x, bias = torch.randn(5, 132).bfloat16(), torch.randn(37)
    assert torch.equal(product(x, w, w.pack(), bias), product(x, w, w.pack(), bias.bfloat16()))


def random_case(draw):
    """(pattern, m, n, sparsity, dtype, tokens) with sizes that favour the edges of panels, vectors and windows."""
    pattern = draw.choice(["unstructured"] * 4 + ["2:4", "2:4", "4:8", "1:4", "3:5", "16:32"])
    group = 1 if pattern == "unstructured" else int(pattern.partition(":")[2])
    near = draw.choice((16, 32, 64, 128, 256))
    n = max(1, draw.choice((draw.randint(1, 300), near * draw.randint(1, 4) + draw.randint(-2, 2))))
    m = draw.choice((draw.randint(1, 80), 16 * draw.randint(1, 5) + draw.randint(-1, 1)))
    sparsity = draw.choice((0.0, 0.5, 0.97, 1.0, draw.random())) if pattern == "unstructured" else None
    return pattern, m, -(-n // group) * group, sparsity, draw.choice(DTYPES), draw.randint(1, 70)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_patterns_and_sparsities(isa, seed):
    draw = random.Random(seed)
    for index in range(25):
        pattern, m, n, sparsity, dtype, tokens = case = random_case(draw)
        w = weight(pattern, m, n, sparsity, dtype, 1000 * seed + index)
        x = torch.randn(tokens, n + draw.randint(0, 3)).to(dtype)[:, -n:]
        bias = torch.randn(m).to(dtype) if draw.random() < 0.5 else None
        expected = x.double() @ w.dense.T + (0 if bias is None else bias.double())
        for layout in layouts(pattern, dtype):
            tensor = w.pack(layout)
            assert_close(product(x, w, tensor, bias), expected, layout, case)
            values, metadata = packed.unpack(tensor, *w.shape)
            assert torch.equal(values, w.values) and torch.equal(metadata, w.metadata), (case, layout)
