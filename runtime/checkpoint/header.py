"""Safetensors headers: names, shapes and dtypes of a file without reading its data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise FormatError(f"{self.file.name}: header metadata {METADATA_KEY!r} is not JSON ({error})") from error


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
    metadata = entries.pop("__metadata__", {})
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise FormatError(
                f"{path.name}: truncated: tensor {name} ends at byte {8 + length + end}, the file has {size}; "
                "copy it again"
            )
        if entry["dtype"] not in DTYPES:
            raise FormatError(f"{path.name}: tensor {name} has the unknown dtype {entry['dtype']!r}")
        tensors[name] = TensorEntry(path, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if tensors[name].nbytes != end - begin:
            raise FormatError(
                f"{path.name}: tensor {name} of shape {tensors[name].shape} needs {tensors[name].nbytes} bytes, "
                f"the file holds {end - begin}"
            )
    return Header(path, tensors, metadata)
