"""Safetensors headers: names, shapes and dtypes of a file without reading its data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, ValidationError

from sparse_rt.errors import FormatError

METADATA_KEY = "sparse_rt"
# A header larger than this is not a header: the limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


Size = Annotated[int, Field(ge=0, strict=True)]


class _Described(BaseModel):
    """What a header says about one tensor."""

    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file; ``metadata`` is its free text dictionary."""

    file: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)

    def sparse(self) -> dict | None:
        """What the file says about its compressed weights: ``{"format_version", "weights": {name: ...}}``."""
        text = self.metadata.get(METADATA_KEY)
        if text is None:
            return None
        try:
            described = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise FormatError(f"{self.file.name}: header metadata {METADATA_KEY!r} is not JSON ({error})") from error
        if not isinstance(described, dict) or not isinstance(described.get("weights", {}), dict):
            raise FormatError(f"{self.file.name}: header metadata {METADATA_KEY!r} is damaged; copy the file again")
        return described


def read_header(path: str | Path) -> Header:
    """Read and check the header of ``path``; ``FormatError`` for a truncated or foreign file."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, max(size - 8, 0)):
            raise FormatError(f"{path.name}: truncated or not a safetensors file ({size} bytes)")
        try:
            entries = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{path.name}: the safetensors header is damaged ({error})") from error
    metadata = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict):
        raise FormatError(f"{path.name}: the safetensors header is damaged (no table of tensors and texts)")
    tensors = {name: _entry(path, name, found, 8 + length, size) for name, found in entries.items()}
    return Header(path, tensors, metadata)


def _entry(path: Path, name: str, found: object, start: int, size: int) -> TensorEntry:
    """The entry of tensor ``name`` in a file of ``size`` bytes whose data begin at byte ``start``."""
    try:
        described = _Described.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "entry"
        raise FormatError(f"{path.name}: header of tensor {name}: {where}: {problem['msg']}; copy it again") from error
    begin, end = described.data_offsets
    if start + end > size:
        raise FormatError(
            f"{path.name}: truncated: tensor {name} ends at byte {start + end}, the file has {size}; copy it again"
        )
    if described.dtype not in DTYPES:
        raise FormatError(f"{path.name}: tensor {name} has the unknown dtype {described.dtype!r}")
    entry = TensorEntry(path, DTYPES[described.dtype], tuple(described.shape))
    if entry.nbytes != end - begin:
        raise FormatError(
            f"{path.name}: tensor {name} of shape {entry.shape} needs {entry.nbytes} bytes, the file holds "
            f"{end - begin}; copy it again"
        )
    return entry
