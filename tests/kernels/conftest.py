"""Every instruction set in turn, and memory whose end is guarded."""

import ctypes
import mmap

import pytest
import torch

from sparse_rt.errors import BackendError
from sparse_rt.kernels.native import library


@pytest.fixture(params=library.ISAS)
def isa(request):
    """The name of an instruction set that is in use during the test; those of other processors are skipped."""
    handle = library.load()
    try:
        handle.use_isa(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    yield request.param
    handle.use_isa("")


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def guarded():
    """A function that copies a tensor right in front of a page that may not be touched and returns its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, kept = mmap.PAGESIZE, []

    def place(tensor):
        size = tensor.numel() * tensor.element_size()
        pages = mmap.mmap(-1, (size // page + 2) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        last = start + len(pages) - page
        assert libc.mprotect(last, page, 0) == 0
        kept.append((last, pages))
        ctypes.memmove(last - size, tensor.contiguous().data_ptr(), size)
        return last - size

    yield place
    for last, _ in kept:
        libc.mprotect(last, page, mmap.PROT_READ | mmap.PROT_WRITE)
