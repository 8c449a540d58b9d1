"""The fragment layout of 2:4 weights: the packer against a model of the instruction, and what surrounds the kernel.

The kernel itself is run in test_mma_sp_ptx.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mma_sp_model as model
from sparse_rt.errors import BackendError
from sparse_rt.formats import get_format
from sparse_rt.kernels.triton import cslt, fragments

pytest.importorskip("triton")

from sparse_rt.kernels.triton import mma_sp

FORMAT = get_format("2:4")
SHAPES = [(1, 4), (17, 60), (16, 256), (33, 132), (70, 516)]


def weight(m: int, n: int, dtype=torch.bfloat16, seed: int = 0):
    """A random 2:4 weight in canonical form, with kept zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(m, n, generator=generator).to(dtype)
    values, metadata = FORMAT.compress(dense, FORMAT.mask_from_scores(torch.rand(m, n, generator=generator)))
    values.view(-1)[::7] = 0.0
    values.view(-1)[::11] = -0.0
    return values, metadata


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_gives_back_every_bit(shape, dtype):
    values, metadata = weight(*shape, dtype)
    bits(values).view(-1)[0] = 0x7FC1  # NaN with a payload
    packed = fragments.pack_fragments(values, metadata, *shape)
    assert tuple(part.shape for part in packed) == fragments.shapes(*shape)
    again, metadata_again = fragments.unpack_fragments(*packed, *shape, dtype)
    assert torch.equal(bits(again), bits(values)) and torch.equal(metadata_again, metadata)


def test_bits_in_the_padding_of_the_metadata_are_not_read():
    values, metadata = weight(5, 12)
    poisoned = metadata.clone()
    poisoned[:, -1] |= 0xF0
    clean, again = (fragments.pack_fragments(values, given, 5, 12) for given in (metadata, poisoned))
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])


def operand_b(x: np.ndarray, unit: int, tile: int) -> np.ndarray:
    """The registers of B for 8 tokens, uint32 [32, 4], with the groups of a tile renumbered as fragments.py says."""
    columns = np.zeros(32, int)
    for in_memory in range(8):
        v, p, s = in_memory // 4, in_memory // 2 % 2, in_memory % 2
        number = 4 * v + 2 * s + p
        columns[4 * number : 4 * number + 4] = unit * 256 + tile * 32 + in_memory * 4 + np.arange(4)
    b = x[:, columns].T.view(np.uint16).astype(np.uint32)  # [32, 8 tokens]
    lane = np.arange(32)
    return np.stack(
        [b[lane % 4 * 2 + 8 * i, lane >> 2] | b[lane % 4 * 2 + 8 * i + 1, lane >> 2] << 16 for i in range(4)], 1
    )


def product(packed, x: np.ndarray, m: int) -> np.ndarray:
    """x [8, padded columns] float16 times the packed weight, tile by tile through the model: float64 [8, m]."""
    a, e = (part.numpy().view(np.uint32) for part in packed)
    y = np.zeros((a.shape[0], 16, 8))
    for unit in range(a.shape[1]):
        for tile in range(8):
            b = np.broadcast_to(operand_b(x, unit, tile), (a.shape[0], 32, 4))
            c, words = np.zeros((a.shape[0], 32, 4)), e[:, unit, :, tile // 2]
            y += model.lanes_to_dense(model.multiply(a[:, unit, tile], b, c, words, tile % 2, "f16"))
    return y.reshape(-1, 8)[:m].T


@pytest.mark.parametrize("shape", SHAPES)
def test_the_instruction_multiplies_what_was_packed(shape):
    m, n = shape
    values, metadata = weight(m, n, torch.float16)
    x = np.zeros((8, -(-n // 256) * 256), np.float16)
    x[:, :n] = np.random.default_rng(0).standard_normal((8, n))
    expected = x[:, :n].astype(np.float64) @ FORMAT.decompress(values, metadata, m, n).double().numpy().T
    np.testing.assert_allclose(product(fragments.pack_fragments(values, metadata, m, n), x, m), expected, atol=1e-12)


def test_every_pair_of_positions_reaches_the_right_column():
    """One weight at a time: its product with distinct powers of two names its row, column and value."""
    m, n = 16, 256
    x = np.zeros((8, n), np.float16)
    x[:4] = [np.arange(n) % 16 + 1, np.arange(n) // 16 + 1, np.ones(n), np.zeros(n)]
    for pair in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        dense = torch.zeros(m, n // 4, 4, dtype=torch.float16)
        dense[..., list(pair)] = torch.randn(m, n // 4, 2, generator=torch.Generator().manual_seed(sum(pair))).half()
        dense = dense.view(m, n)
        canonical = FORMAT.compress(dense, FORMAT.mask_of(dense))
        got = product(fragments.pack_fragments(*canonical, m, n), x, m)
        np.testing.assert_allclose(got, x.astype(np.float64) @ dense.double().numpy().T, atol=1e-9)


def test_metadata_words_are_those_of_cutlass():
    """torch carries CUTLASS's order for the same instruction: lane 4 g + 2 selector + half."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    m, n = 32, 256
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(m, n, generator=generator).half()
    mask = FORMAT.mask_from_scores(torch.rand(m, n, generator=generator))
    _, theirs = conversions.sparse_semi_structured_from_dense_cutlass(dense * mask)
    # [32-column block, row group, lane]: selector 0 is the first row tile, 1 the second; here they are column tiles.
    theirs = theirs.view(-1).view(torch.int32).view(n // 32, 8, 2, 2)
    # Undo the renumbering of the groups of a tile, so that the instruction's own order is left.
    order = [4 * v + 2 * p + s for v in range(2) for s in range(2) for p in range(2)]
    renumbered = (dense * mask).view(m, n // 32, 8, 4)
    inverse = [order.index(i) for i in range(8)]
    renumbered = renumbered[:, :, inverse].reshape(m, n)
    canonical = FORMAT.compress(renumbered, (mask.view(m, n // 32, 8, 4)[:, :, inverse]).reshape(m, n))
    ours = fragments.pack_fragments(*canonical, m, n)[1].view(2, 8, 2, 2, 4)  # row tile, g, selector, half, word
    for block in range(n // 32):
        for row_tile in range(2):
            assert torch.equal(ours[row_tile, :, block % 2, :, block // 2], theirs[block, :, row_tile])


def test_the_model_refuses_undefined_metadata():
    zeros = np.zeros((32, 4), np.uint32)
    with pytest.raises(model.UndefinedBehaviour, match="metadata"):
        model.multiply(zeros, zeros, zeros, np.zeros(32, np.uint32), 0, "bf16")
    with pytest.raises(model.UndefinedBehaviour, match="selector"):
        model.multiply(zeros, zeros, zeros, np.full(32, 0x44444444, np.uint32), 2, "bf16")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expand_gives_the_dense_weight(shape, dtype, device):
    values, metadata = weight(*shape, dtype)
    packed = [part.to(device) for part in fragments.pack_fragments(values, metadata, *shape)]
    out = torch.full(shape, 7.0, dtype=dtype, device=device)
    mma_sp.expand(*packed, *shape, out)
    assert torch.equal(bits(out).cpu(), bits(FORMAT.decompress(values, metadata, *shape)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_parts_are_summed_with_the_bias(with_bias, device):
    parts = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(37).bfloat16()
    y = torch.empty(5, 37)  # not bfloat16: the interpreter rounds to that by cutting
    given = [tensor.to(device) for tensor in (parts, bias if with_bias else y, y)]
    mma_sp.sum_parts_kernel[1, 5](*given, 37, 5, SPLIT=3, HAS_BIAS=with_bias, BLOCK=64)
    expected = parts[0] + parts[1] + parts[2] + (bias.float() if with_bias else 0)
    assert torch.equal(given[2].cpu(), expected)


@pytest.mark.parametrize("shape", [(16, 256), (1024, 4096), (4096, 14336), (28672, 8192), (70, 516), (4096, 11008)])
@pytest.mark.parametrize("options", [*mma_sp.DEFAULTS, dict(ROW_TILES=1, num_warps=8)])
def test_a_launch_covers_every_unit_once(shape, options):
    m, n = shape
    row_tiles = options["ROW_TILES"]
    plan = mma_sp.launch_plan(m, n, 3, options, 132)
    units, step = -(-n // 256), plan["WARPS"] * plan["SPLIT"]
    assert plan["programs"] * row_tiles * 16 >= m and step <= units
    assert plan["RAGGED"] == (units % step != 0) and plan["PARTIAL"] == (n % 256 != 0)
    # Very few rows must not leave multiprocessors idle where there are columns to share; a program for every fourth of
    # them is enough to be left alone.
    if 4 * plan["programs"] < 132:
        assert plan["programs"] * step >= min(132 * 4, plan["programs"] * units) // 2
    else:
        assert (plan["WARPS"], plan["SPLIT"]) == (min(options["num_warps"], units), 1)


def test_default_options_share_x_where_there_are_programs_enough():
    one, two, many = mma_sp.DEFAULTS
    assert mma_sp.default_options(28672, 8, 132) == one == mma_sp.default_options(1024, 16, 132)
    assert mma_sp.default_options(4096, 9, 132) == two and mma_sp.default_options(14336, 16, 132) == many


def test_refusals_say_what_is_wrong():
    assert "float32" in fragments.refusal(torch.float32, 16, 64)
    assert "16 through" not in (mma_sp.refusal(16, torch.bfloat16, "cuda") or "")
    assert mma_sp.refusal(17, torch.bfloat16, "cuda").startswith("17 tokens")
    values, metadata = weight(4, 8)
    with pytest.raises(BackendError, match="float32"):
        fragments.pack_fragments(values.float(), metadata, 4, 8)
    with pytest.raises(BackendError, match="GPU"):
        mma_sp.linear(torch.zeros(1, 8).bfloat16(), *fragments.pack_fragments(values, metadata, 4, 8), None, 4, 8)


def test_cusparselt_says_why_it_is_not_there():
    values, metadata = weight(32, 64)
    assert "multiples of 16" in cslt.refusal(torch.bfloat16, 30, 64)
    assert "float32" in cslt.refusal(torch.float32, 32, 64)
    if cslt.unavailable_reason() is None:
        pytest.skip("it is there")
    with pytest.raises(BackendError, match="CUDA|cuSPARSELt"):
        cslt.compress(values, metadata, 32, 64)


def test_numbers_of_tokens_share_an_algorithm_up_to_a_power_of_two():
    assert [cslt.bucket(tokens) for tokens in (1, 2, 3, 512, 513)] == [1, 2, 4, 512, 1024]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
@pytest.mark.parametrize("shape", [(17, 60), (1024, 4096), (4096, 11008)])
def test_linear_on_the_gpu(shape, tokens):
    m, n = shape
    values, metadata = weight(m, n)
    packed = [part.cuda() for part in fragments.pack_fragments(values, metadata, m, n)]
    x, bias = torch.randn(tokens, n).bfloat16(), torch.randn(m).bfloat16()
    got = mma_sp.linear(x.cuda(), *packed, bias.cuda(), m, n).cpu().double()
    expected = x.double() @ FORMAT.decompress(values, metadata, m, n).double().T + bias.double()
    assert (got - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 512])
def test_cusparselt_on_the_gpu(tokens):
    if cslt.unavailable_reason():
        pytest.skip(cslt.unavailable_reason())
    m, n = 512, 1024
    values, metadata = weight(m, n)
    blob = cslt.compress(values.cuda(), metadata.cuda(), m, n)
    x, bias = torch.randn(tokens, n).bfloat16(), torch.randn(m).bfloat16()
    expected = x.double() @ FORMAT.decompress(values, metadata, m, n).double().T + bias.double()
    for _ in range(2):
        got = cslt.linear(x.cuda(), blob, bias.cuda(), m, n).cpu().double()
        assert (got - expected).norm() <= 4e-3 * expected.norm()
        assert cslt.sweep(blob, m, n, tokens) or _
