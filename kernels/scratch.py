"""Scratch buffers that one thread's operations share, so that no layer keeps a dense copy of its weight.

A buffer grows to the largest request and stays: a fresh allocation of that size is returned to the system after every
call, and touching its pages again costs ten times the decompression that fills it. What a buffer holds is undefined
after the next request for it; operations never return one.

On a GPU every stream has its own: what runs on two streams runs at the same time. A buffer that was handed out while a
CUDA graph was captured belongs to that graph too and is never freed.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_thread = threading.local()
_captured: dict[int, Tensor] = {}  # replaying a graph writes to these whether or not they have been outgrown since


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised contiguous tensor; the same memory for every call with this name, dtype, device and stream."""
    buffers, device = _buffers(), torch.device(device)
    on_gpu = device.type == "cuda"
    key = name, dtype, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    size = math.prod(shape)
    held = buffers.get(key)
    if held is None or held.numel() < size:
        buffers.pop(key, None)  # the old one is freed before the new one is allocated
        del held
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            held = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured[id(held)] = held
    return held[:size].view(shape)


def nbytes() -> int:
    """Bytes that this thread's buffers hold."""
    return sum(held.nbytes for held in _buffers().values())


def release() -> None:
    """Free this thread's buffers; the next request allocates again."""
    _buffers().clear()


def _buffers() -> dict[tuple[str, torch.dtype, torch.device, int], Tensor]:
    if not hasattr(_thread, "buffers"):
        _thread.buffers = {}
    return _thread.buffers
