"""The makers of packed weights: portable C and AVX-512 write the same bytes and give the canonical tensors back bit for
bit, from and into buffers that end at a page that must not be touched."""

import ctypes
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from packed_cases import inside_nan, shifted
from sparse_rt.formats import get_format
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.packed import DTYPES, LAYOUTS, PANEL

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# One row; a part of a panel of 16 and of a unit of 64; columns in front of and behind 32, 64, 128 and 512; half a byte
# of 2:4 metadata at the end of a row; more than a window of 128 columns.
SHAPES = (1, 1), (1, 4), (15, 64), (17, 33), (37, 100), (64, 512), (70, 516), (33, 1000), (130, 2060)
PATTERNS = "unstructured", "2:4", "4:8", "1:4"
DENSITIES = 0.0, 0.03, 0.25, 0.5, 0.97, 1.0


@dataclass(frozen=True)
class Case:
    values: Tensor
    metadata: Tensor
    pattern: str
    m: int
    n: int

    @property
    def nibbles(self):
        return int(self.pattern == "2:4")


@pytest.fixture
def makers():
    """A function that chooses "scalar" or "avx512" makers; the layouts of the best instruction set stay allowed."""
    handle = library.load().handle
    if handle.srt_use_isa(b"avx512") != 0:
        pytest.skip("this processor has the portable makers only")
    yield lambda name: handle.srt_use_isa(name.encode())
    handle.srt_use_isa(b"")


def cases(pattern, dtype, shapes=SHAPES):
    """Any bits as values: NaN, infinities, -0.0 and kept zeros; rows that are empty, full, and empty on one side."""
    fmt, integer = get_format(pattern), BITS[dtype]
    for m, n in shapes:
        if fmt.refuse_shape(m, n):
            continue
        for density in DENSITIES if pattern == "unstructured" else (None,):
            torch.manual_seed(m * n)
            mask = fmt.mask_from_scores(torch.rand(m, n)) if density is None else torch.rand(m, n) < density
            if density and m > 3:
                mask[m // 2], mask[m // 3], mask[m // 4] = False, True, torch.arange(n) < n // 2
            dense = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (m, n), dtype=integer)
            dense[torch.rand(m, n) < 0.1] = 0
            values, metadata = fmt.compress(torch.where(mask, dense, 0), mask)
            yield Case(values.view(dtype), metadata, pattern, m, n)


def layouts(pattern, dtype):
    slots = ["slots"] if dtype == torch.bfloat16 else []
    return ["bitmask", *slots, *(["pairs"] if slots and pattern == "2:4" else [])]


def plan(case, layout, place=Tensor.data_ptr, threads=1):
    """(counts, steps, header) and pointers to them, of srt_packed_plan."""
    tables = [torch.zeros(-(-case.m // PANEL) + 1, dtype=torch.int64) for _ in range(2)]
    header = torch.zeros(128, dtype=torch.uint8)
    pointers = [place(tensor) for tensor in (*tables, header)]
    kind = LAYOUTS.index(layout), DTYPES.index(case.values.dtype)
    shape = case.nibbles, case.m, case.n, case.values.numel()
    metadata = case.metadata.data_ptr()
    kept = library.load().handle.srt_packed_plan(*kind, metadata, *shape, *pointers, threads)
    assert kept == case.values.numel()
    return (*tables, header), pointers


def make(case, layout, values=None, threads=1):
    """Everything that a maker writes, in memory that was full of ones."""
    handle = library.load().handle
    (counts, steps, header), pointers = plan(case, layout, threads=threads)
    packed = torch.full((handle.srt_packed_bytes(header.data_ptr()),), 0xFF, dtype=torch.uint8)
    values = case.values if values is None else values
    source = values.data_ptr(), case.metadata.data_ptr(), case.nibbles
    handle.srt_packed_make(*source, *pointers, packed.data_ptr(), threads)
    return [counts, steps, packed]


def unmake(case, packed, threads=1):
    values, metadata = torch.full_like(case.values, float("nan")), torch.full_like(case.metadata, 0xFF)
    counts = torch.zeros(-(-case.m // PANEL) + 1, dtype=torch.int64)
    outputs = values.data_ptr(), metadata.data_ptr(), counts.data_ptr()
    done = library.load().handle.srt_packed_unmake(packed.data_ptr(), packed.numel(), case.m, case.n, *outputs, threads)
    assert done == 0
    return values, metadata


def runs(layout, dtype):
    return library.load().handle.srt_packed_runs(LAYOUTS.index(layout), DTYPES.index(dtype))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_bits(actual, expected):
    integer = BITS[expected.dtype]
    return torch.equal(actual.view(integer), expected.view(integer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_makers_write_the_same_bytes(makers, pattern, dtype):
    for case, layout in itertools.product(cases(pattern, dtype), layouts(pattern, dtype)):
        makers("scalar")
        expected = make(case, layout)
        makers("avx512")
        for threads in (1, 3):
            assert equal(make(case, layout, threads=threads), expected), (case.m, case.n, layout, threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_makers_give_back_every_bit(makers, pattern, dtype):
    for case, layout in itertools.product(cases(pattern, dtype), layouts(pattern, dtype)):
        if not runs(layout, dtype):
            continue
        packed = make(case, layout)[-1]
        for name, threads in (("scalar", 1), ("avx512", 1), ("avx512", 3)):
            makers(name)
            values, metadata = unmake(case, packed, threads)
            assert same_bits(values, case.values), (case.m, case.n, layout, name)
            assert torch.equal(metadata, case.metadata), (case.m, case.n, layout, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_values_need_no_alignment(makers, pattern, dtype):
    for case, layout in itertools.product(cases(pattern, dtype, [(37, 100), (70, 516)]), layouts(pattern, dtype)):
        if case.values.numel():
            expected = make(case, layout)
            assert equal(make(case, layout, shifted(case.values)), expected), (case.m, case.n, layout)
            part = inside_nan(case.values.flatten())
            assert equal(make(case, layout, part), expected), (case.m, case.n, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_nothing_behind_the_buffers_is_touched(makers, guarded, pattern, dtype):
    """One byte too far ends the process. The packed weight lies unaligned, as whole vectors behind it would show."""
    handle = library.load().handle
    shapes = (1, 4), (16, 28), (17, 60), (65, 132), (16, 1028)
    for case, layout in itertools.product(cases(pattern, dtype, shapes), layouts(pattern, dtype)):
        makers("avx512")
        if not runs(layout, dtype):
            continue
        _, pointers = plan(case, layout, guarded)
        size = handle.srt_packed_bytes(pointers[2])
        packed = guarded(torch.zeros(size, dtype=torch.uint8))
        handle.srt_packed_make(guarded(case.values), guarded(case.metadata), case.nibbles, *pointers, packed, 1)
        assert ctypes.string_at(packed, size) == bytes(make(case, layout)[-1].tolist()), (case.m, case.n, layout)
        outputs = [guarded(torch.zeros_like(tensor)) for tensor in (case.values, case.metadata)]
        assert handle.srt_packed_unmake(packed, size, case.m, case.n, *outputs, pointers[0], 1) == 0
        assert ctypes.string_at(outputs[0], case.values.nbytes) == case.values.view(torch.uint8).numpy().tobytes()
