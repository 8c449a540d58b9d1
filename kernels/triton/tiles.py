"""What the tile loaders need to know of a weight: where the kept weights of every row and block of columns start.

2:4 has constant counts and needs nothing. For a bitmask the index costs 4 bytes a row and 128 columns (0.03 a weight);
it is made on the device without waiting for it, and kept as long as the metadata tensor lives unchanged.

The number of values is taken on trust: comparing it with the metadata would wait for the device. Checkpoints are
checked when they are loaded (``Format.check_data``).
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_rt.errors import UserError
from sparse_rt.formats import get_format

BLOCK = 128  # columns; language.BLOCK for Python code that runs without Triton
WORD_COLUMNS = 32  # columns that four bytes of metadata describe, in both kinds of metadata


class BlockIndex(NamedTuple):
    """starts int64 [m + 1]; offsets int32 [m, blocks]: kept weights of a row before column 128 k."""

    starts: Tensor
    offsets: Tensor


class TileArguments(NamedTuple):
    """Arguments of ``language.load_tile`` and its siblings, in their order."""

    meta: Tensor  # int32 [m, meta_stride]
    starts: Tensor
    offsets: Tensor
    meta_stride: int
    nibbles: bool


class _Entry(NamedTuple):
    stamp: tuple
    padded: Tensor | None  # a copy of the metadata in whole words, where it does not consist of such
    index: BlockIndex | None


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tile_arguments(metadata: Tensor, pattern: str, m: int, n: int) -> TileArguments:
    """metadata uint8 [m, ceil(n / 8)] of a weight (m, n) -> what the loaders take. ``UserError``: it does not fit."""
    entry = _entry(metadata, pattern, m, n)
    source = metadata if entry.padded is None else entry.padded
    words = source.detach().view(torch.int32)
    starts, offsets = (words, words) if entry.index is None else entry.index
    return TileArguments(words, starts, offsets, words.shape[1], entry.index is None)


def index(metadata: Tensor, pattern: str, m: int, n: int) -> BlockIndex | None:
    """The block index of a bitmask; None for 2:4, which needs none."""
    return _entry(metadata, pattern, m, n).index


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device: make it that of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def rows_contiguous(tensor: Tensor, columns: int) -> Tensor:
    """[..., columns] -> [rows, columns] with neighbouring columns next to each other; a view where that is one."""
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), columns)  # -1 is ambiguous where nothing is
    return flat if columns == 1 or flat.stride(1) == 1 else flat.contiguous()


def _entry(metadata: Tensor, pattern: str, m: int, n: int) -> _Entry:
    # Data that was exchanged (`tensor.data = other`) shows in the address, a change in place in the version.
    version = None if metadata.is_inference() else metadata._version
    stamp = version, metadata.data_ptr(), pattern, m, n
    entry = _entries.get(metadata)
    if entry is not None and entry.stamp == stamp:
        return entry
    entry = _Entry(stamp, *_make(metadata, pattern, m, n))
    # While a CUDA graph is captured nothing runs: what is made then holds no data before the graph is replayed.
    if not (metadata.is_cuda and torch.cuda.is_current_stream_capturing()):
        _entries[metadata] = entry
    return entry


@torch.no_grad()
def _make(metadata: Tensor, pattern: str, m: int, n: int) -> tuple[Tensor | None, BlockIndex | None]:
    fmt = get_format(pattern)
    want = fmt.metadata_shape(m, n)
    if metadata.dtype != torch.uint8 or tuple(metadata.shape) != want:
        raise UserError(
            f"{fmt.metadata_name} of a {pattern} weight ({m}, {n}) is uint8 {want}, "
            f"got {str(metadata.dtype).removeprefix('torch.')} {tuple(metadata.shape)}"
        )
    nibbles = fmt.metadata_name == "weight_meta"
    # A tensor made in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        plain = metadata.clone() if metadata.is_inference() else metadata.detach()
        whole = n % WORD_COLUMNS == 0 and metadata.is_contiguous() and metadata.data_ptr() % 4 == 0
        padded = None if whole else _pad(plain, n, nibbles)
        words = plain if whole else padded
        return padded, None if nibbles else _index(words, m, n)


def _pad(metadata: Tensor, n: int, nibbles: bool) -> Tensor:
    """uint8 [m, bytes of whole words], zeros behind the last column."""
    m, used = metadata.shape
    padded = metadata.new_zeros(m, -(-n // WORD_COLUMNS) * 4)
    padded[:, :used] = metadata
    if n % 8 and not nibbles:
        padded[:, used - 1] &= (1 << n % 8) - 1
    return padded


def _index(words: Tensor, m: int, n: int) -> BlockIndex:
    blocks = -(-n // BLOCK)
    bits = words.view(torch.int32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    counts = torch.nn.functional.pad(bits.view(torch.uint8), (0, blocks * (BLOCK // 8) - 4 * bits.shape[1]))
    counts = counts.view(m, blocks, BLOCK // 8).sum(-1, dtype=torch.int32)
    ends = counts.cumsum(1, dtype=torch.int32)
    starts = torch.zeros(m + 1, dtype=torch.int64, device=words.device)
    torch.cumsum(counts.sum(1, dtype=torch.int64), 0, out=starts[1:])
    return BlockIndex(starts, ends - counts)
