"""The shard that is being filled: its tensors wait in a file until they are written as one safetensors file.

safetensors' own serializer wants all tensors of a file in memory at once, which for shards of 5 GB would be most of
what a conversion takes. Writing and reading them once more costs `convert --method none`, which does nothing else, 2 to
10 % of its time (benchmarks/NOTES.md). The result is byte for byte what the library writes, with its free text in a
fixed order (the library's is that of a randomly seeded hash map); ``tests/checkpoint/test_shard.py`` compares them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sparse_rt.checkpoint.header import DTYPES
from sparse_rt.errors import SparseRTError

# Tensors lie in a file by dtype, in this order, and by name: so each begins at a multiple of its element's size.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPY_BYTES = 1 << 18  # 64 KB at a time are slower, 1 MB were five times as slow every other run


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the raw bytes of a tensor."""
    return hashlib.sha256(raw_bytes(tensor.cpu().contiguous())).hexdigest()


@dataclass
class _Waiting:
    """One tensor; ``stored`` gives its sha256 and where its bytes begin in the spool."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: Future[tuple[str, int]]


class OpenShard:
    """Tensors by name, in a file in ``folder`` that never has a name: nothing stays behind however the process ends.

    ``worker`` hashes and stores one at a time, beside the thread that makes the next one.
    """

    def __init__(self, worker: Executor, folder: Path):
        self.nbytes = 0
        self._worker, self._folder = worker, folder
        self._waiting: dict[str, _Waiting] = {}
        self._spool = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def add(self, name: str, tensor: Tensor) -> None:
        """Returns once the tensor before is stored, so one at most is on its way; raises what went wrong with it."""
        if self._waiting:
            next(reversed(self._waiting.values())).stored.result()
        tensor = tensor.detach().cpu().contiguous()
        stored = self._worker.submit(self._store, raw_bytes(tensor))
        self._waiting[name] = _Waiting(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, stored)
        self.nbytes += tensor.nbytes

    def write(self, path: Path, metadata: dict[str, str]) -> dict[str, str]:
        """Write all tensors, in a file with the free text ``metadata``; their sha256 by name. Nothing waits then."""
        digests = {name: waiting.stored.result()[0] for name, waiting in self._waiting.items()}
        ordered = sorted(self._waiting.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0]))
        with _disk(path.parent), path.open("wb", buffering=0) as file:
            _write_all(file, _header(ordered, metadata))
            for _, waiting in ordered:
                self._copy(waiting, file)
        self._waiting, self.nbytes = {}, 0
        self._spool.truncate(0)
        self._spool.seek(0)
        return digests

    def _store(self, raw: memoryview) -> tuple[str, int]:
        offset = self._spool.tell()
        with _disk(self._folder):
            _write_all(self._spool, raw)
        return hashlib.sha256(raw).hexdigest(), offset

    def _copy(self, waiting: _Waiting, file: BinaryIO) -> None:
        buffer = memoryview(bytearray(min(COPY_BYTES, waiting.nbytes)))
        offset, left = waiting.stored.result()[1], waiting.nbytes
        while left:
            read = os.preadv(self._spool.fileno(), [buffer[:left]], offset)
            if read == 0:
                raise SparseRTError(f"the file in {self._folder} with the tensors of a shard is shorter than it was")
            _write_all(file, buffer[:read])
            offset, left = offset + read, left - read


def _header(ordered: list[tuple[str, _Waiting]], metadata: dict[str, str]) -> bytes:
    """Length and text of a safetensors header; spaces at its end make the data begin at a multiple of 8."""
    described, offset = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, waiting in ordered:
        end = offset + waiting.nbytes
        described[name] = {"dtype": waiting.dtype, "shape": list(waiting.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say what is missing when the disk is full."""
    try:
        yield
    except OSError as error:
        raise SparseRTError(
            f"a shard cannot be written in {folder} ({error.strerror}); make room there for the output and one "
            "shard more, or lower --max-shard-size"
        ) from error


def _write_all(file: BinaryIO, raw: memoryview | bytes) -> None:
    """The system may write less than asked for at a time: no more than 2 GB for one."""
    rest = memoryview(raw)
    while rest:
        rest = rest[file.write(rest) :]
