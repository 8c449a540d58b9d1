"""Memory pages of packed weights and of the tensors that they replace."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.kernels.native import library

HUGE_PAGE = 2 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def empty(nbytes: int) -> Tensor:
    """uint8 [nbytes], on 2 MB pages as far as whole ones fit; the address space around it is never touched.

    Large ones are mappings of their own: in the heap of malloc the room around one may lie on pages of what was freed
    there before, and keeps them (a model of 1B parameters in vLLM: 0.8 MB a weight).
    """
    with torch.inference_mode(False):
        if nbytes < HUGE_PAGE:
            return torch.empty(nbytes, dtype=torch.uint8)
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE_PAGE
    tensor = room[start : start + nbytes]
    library.load().handle.srt_advise_huge(tensor.data_ptr(), nbytes)
    return tensor


def page_out(tensor: Tensor) -> None:
    """Take the pages of a file that ``tensor`` lies in out of memory; whoever reads them again gets them from the disk.

    A checkpoint stays mapped as long as one of its tensors lives, and with it every page that was read (75 %, a model
    of 1B parameters in transformers: 0.6 GB of 2.0). Does nothing to memory that is not a file's, and loses nothing.
    """
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if stop > start and _is_of_a_file(start):
        library.load().handle.srt_page_out(start, stop - start)


def _is_of_a_file(address: int) -> bool:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        span, _, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return inode != "0"
    return False
