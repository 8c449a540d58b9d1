"""decompress and gather: bit for bit, every pattern, odd shapes; and the index of blocks that they read through."""

import gc

import pytest
import torch

import packed_cases

pytest.importorskip("triton")
from sparse_rt.formats import get_format
from sparse_rt.kernels.triton import decompress as kernels
from sparse_rt.kernels.triton import tiles

CASES = (
    ("2:4", 1, 4, None),
    ("2:4", 17, 60, None),
    ("2:4", 33, 132, None),
    ("2:4", 16, 256, None),
    ("4:8", 33, 264, None),
    ("unstructured", 1, 1, 0.0),
    ("unstructured", 17, 60, 0.5),
    ("unstructured", 17, 60, 1.0),
    ("unstructured", 33, 130, 0.9),
    ("unstructured", 33, 130, 0.0),
    ("unstructured", 16, 384, 0.5),
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back_bit_for_bit(device, case, dtype):
    weight = packed_cases.weight(*case, dtype)
    values, metadata = weight.values.to(device), weight.metadata.to(device)
    dense = kernels.decompress(values, metadata, *weight.shape)
    assert dense.dtype == dtype and torch.equal(dense.double().cpu(), weight.dense)
    assert torch.equal(kernels.gather(dense, metadata, *weight.shape, values), values)


@pytest.mark.parametrize("case", (CASES[1], CASES[6]), ids=str)
def test_padding_bits_and_stored_zeros(device, case):
    weight = packed_cases.weight(*case, torch.float32)
    values, metadata = weight.values.clone().to(device), weight.metadata.clone().to(device)
    metadata[:, -1] |= 0xE0
    values.view(-1)[::3] = 0.0  # kept, although zero
    dense = kernels.decompress(values, metadata, *weight.shape)
    expected = get_format(weight.pattern).decompress(values, weight.metadata.to(device), weight.m, weight.n)
    assert torch.equal(dense, expected)
    assert torch.equal(kernels.gather(dense, metadata, *weight.shape, values), values)


@pytest.mark.parametrize("case", (CASES[2], CASES[8]), ids=str)
def test_strided_dense_and_a_narrower_result(device, case):
    weight = packed_cases.weight(*case, torch.float32)
    values, metadata = weight.values.to(device), weight.metadata.to(device)
    dense = weight.dense.float()
    for strided in (packed_cases.inside_nan(dense), dense.T.contiguous().T):
        assert torch.equal(kernels.gather(strided.to(device), metadata, *weight.shape, values), values)
    narrow = torch.empty(weight.m, weight.n, dtype=torch.bfloat16, device=device)
    kernels.decompress_into(narrow, values, metadata, weight.pattern)
    assert torch.equal(narrow.cpu(), dense.bfloat16())


@pytest.mark.parametrize("case", CASES[5:], ids=str)
def test_index_counts_the_weights_before_every_block(device, case):
    weight = packed_cases.weight(*case, torch.float32)
    index = tiles.index(weight.metadata.to(device), *weight.shape)
    mask = get_format(weight.pattern).unpack_mask(weight.metadata, weight.m, weight.n)
    starts = [0, *mask.sum(1).cumsum(0).tolist()]
    offsets = [[int(row[: tiles.BLOCK * k].sum()) for k in range(-(-weight.n // tiles.BLOCK))] for row in mask]
    assert index.starts.tolist() == starts and index.starts.dtype == torch.int64
    assert index.offsets.tolist() == offsets and index.offsets.dtype == torch.int32


def test_index_is_made_once_and_again_when_the_metadata_change(device):
    weight = packed_cases.weight("unstructured", 33, 130, 0.5, torch.float32)
    other = packed_cases.weight("unstructured", 33, 130, 0.5, torch.float32, seed=1)
    metadata = weight.metadata.clone().to(device)
    first = tiles.index(metadata, *weight.shape)
    assert tiles.index(metadata, *weight.shape).offsets is first.offsets
    for change in ("in place", "data"):
        source = weight.metadata if change == "data" else other.metadata
        if change == "data":
            metadata.data = source.clone().to(device)
        else:
            metadata.copy_(source)
        fresh = tiles.index(source.clone().to(device), *weight.shape)
        assert torch.equal(tiles.index(metadata, *weight.shape).offsets, fresh.offsets)


def test_index_dies_with_the_metadata(device):
    weight = packed_cases.weight("unstructured", 33, 130, 0.5, torch.float32)
    metadata = weight.metadata.clone().to(device)
    kernels.decompress(weight.values.to(device), metadata, *weight.shape)
    assert metadata in tiles._entries
    before = len(tiles._entries)
    del metadata
    gc.collect()
    assert len(tiles._entries) == before - 1


def test_weights_of_inference_mode(device):
    weight = packed_cases.weight("unstructured", 17, 60, 0.5, torch.float32)
    with torch.inference_mode():
        values, metadata = weight.values.clone().to(device), weight.metadata.clone().to(device)
        for _ in range(2):
            dense = kernels.decompress(values, metadata, *weight.shape)
            assert torch.equal(dense.double().cpu(), weight.dense)
