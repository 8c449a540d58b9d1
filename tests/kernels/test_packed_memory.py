"""Products with packed weights read nothing but their operands: poison around them changes no bit, and every buffer may
end at a page that must not be touched."""

import ctypes
import itertools

import pytest
import torch

from packed_cases import assert_close, inside_nan, layouts, weight
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.packed import DTYPES, LAYOUTS

PATTERNS = ("2:4", "unstructured")
HALF_A_BYTE = 12, 132, 60, 1004  # columns whose last byte of 2:4 metadata holds one nibble
ODD = 3, 133, 63, 999


def with_padding(w):
    """The metadata with every bit behind column n set."""
    metadata = w.metadata.clone()
    metadata[:, -1] |= 0xF0 if w.pattern == "2:4" else 0xFF << w.n % 8 & 0xFF
    assert not torch.equal(metadata, w.metadata)
    return metadata


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_lies_around_the_operands_does_not_matter(isa, pattern, dtype):
    for m, n in zip((5, 37, 17, 16), HALF_A_BYTE if pattern == "2:4" else ODD, strict=True):
        w = weight(pattern, m, n, 0.75, dtype)
        values = inside_nan(w.values.flatten()).view(w.values.shape)
        x, bias = torch.randn(25, n).to(dtype), torch.randn(m).to(dtype)
        for layout in layouts(pattern, dtype):
            clean, poisoned = w.pack(layout), packed.pack(values, with_padding(w), *w.shape, layout)
            for tokens in (1, 4, 25):
                y = packed.packed_linear(inside_nan(x[:tokens]), poisoned, inside_nan(bias), *w.shape[1:])
                assert torch.equal(y, packed.packed_linear(x[:tokens], clean, bias, *w.shape[1:])), (layout, n, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_buffer_is_read_or_written_past_its_end(isa, guarded, pattern, dtype):
    """One byte too far ends the process."""
    handle = library.load().handle
    for (m, n), layout in itertools.product(((1, 4), (17, 60), (65, 132), (16, 1028)), layouts(pattern, dtype)):
        w = weight(pattern, m, n, 0.75, dtype)
        table, nbytes = torch.zeros(-(-m // 16) + 1, dtype=torch.int64), w.values.nbytes
        plan = guarded(table), guarded(table), guarded(torch.zeros(128, dtype=torch.uint8))
        source = guarded(w.metadata), int(pattern == "2:4")
        kind = LAYOUTS.index(layout), DTYPES.index(dtype)
        assert handle.srt_packed_plan(*kind, *source, m, n, w.values.numel(), *plan, 1) == w.values.numel()
        size = handle.srt_packed_bytes(plan[2])
        tensor = guarded(torch.empty(size, dtype=torch.uint8))
        handle.srt_packed_make(guarded(w.values), *source, *plan, tensor, 1)
        for tokens in (1, 3, 26):
            x, bias, y = torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype), torch.empty(tokens, m, dtype=dtype)
            work = guarded(torch.empty(handle.srt_packed_workspace(tensor, tokens), dtype=torch.uint8))
            operands = guarded(x), n, tokens, guarded(bias)
            out = guarded(y)
            assert handle.srt_packed_linear(tensor, size, m, n, *operands, out, m, work, 2) == 0
            ctypes.memmove(y.data_ptr(), out, y.nbytes)
            assert_close(y, x.double() @ w.dense.T + bias.double(), layout, m, n, tokens)
        values, metadata = guarded(torch.zeros_like(w.values)), guarded(torch.zeros_like(w.metadata))
        assert handle.srt_packed_unmake(tensor, size, m, n, values, metadata, guarded(table), 1) == 0
        assert ctypes.string_at(values, nbytes) == ctypes.string_at(w.values.data_ptr(), nbytes)
