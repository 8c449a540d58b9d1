"""What can be converted: dense (or pruned, stored dense) folders, sparse compressed-tensors folders, torch pickles."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import QUANT_METHOD, SourceCheckpoint, read_json, resolve_model
from sparse_rt.checkpoint.compressed_tensors import CompressedTensors, is_sparse_format, sparsity_format
from sparse_rt.checkpoint.pickled import PickledCheckpoint, pickled_files
from sparse_rt.errors import FormatError, UserError

# Where config.json may describe how its weights are stored; the last two are older names of compressed-tensors.
CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")


@dataclass(frozen=True)
class SourceTensor:
    """One logical tensor; ``nnz`` is known without reading data when the source stores it compressed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nnz: int | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class Source:
    """The tensors of a model by the names they have in a dense checkpoint (``NAME.weight``), in file order."""

    kind = "dense"

    def __init__(self, checkpoint: SourceCheckpoint | PickledCheckpoint, model: str):
        self.checkpoint, self.model, self.folder = checkpoint, model, checkpoint.folder
        self.tensors = {name: SourceTensor(entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}

    @property
    def config(self) -> dict[str, Any]:
        """config.json without any word about how the weights are stored."""
        return {key: value for key, value in self.checkpoint.config.items() if key not in CONFIG_KEYS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def load(self, name: str) -> Tensor:
        """One tensor, dense."""
        return self.checkpoint.load(name)

    def stored_mask(self, name: str) -> Tensor | None:
        """The mask the source itself stores for ``name`` (bool, dense shape), None when zeros are all there is."""
        return None

    @property
    def revision(self) -> str | None:
        """Commit of a hub snapshot, None for a plain folder."""
        folder = self.folder.absolute()
        return folder.name if folder.parent.name == "snapshots" else None

    def digest(self) -> str:
        """sha256 over config.json and the header of every weight file: what the model is, without reading data."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for header in sorted(self.checkpoint.headers, key=lambda header: header.file.name):
            with header.file.open("rb") as file:
                prefix = file.read(8)
                digest.update(header.file.name.encode() + prefix + file.read(int.from_bytes(prefix, "little")))
        return digest.hexdigest()

    def file_times(self) -> list[list[int]]:
        """Size and modification time of every weight file: notices data replaced under an equal header."""
        stats = [header.file.stat() for header in self.checkpoint.headers]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


class CompressedTensorsSource(Source):
    """A folder written by compressed-tensors as sparse-bitmask or sparse-24-bitmask."""

    kind = "compressed-tensors"

    def __init__(self, checkpoint: SourceCheckpoint, model: str):
        super().__init__(checkpoint, model)
        self.compressed = CompressedTensors(checkpoint)
        kept = {name: entry for name, entry in self.tensors.items() if name not in self.compressed.parts}
        for name, weight in self.compressed.weights.items():
            if name in kept:
                raise FormatError(f"{name} is stored dense and compressed in {self.folder}; remove one of them")
            kept[name] = SourceTensor(weight.dtype, weight.shape, weight.nnz)
        self.tensors = kept

    def load(self, name: str) -> Tensor:
        return self.compressed.load(name) if name in self.compressed.weights else super().load(name)

    def stored_mask(self, name: str) -> Tensor | None:
        return self.compressed.mask(name) if name in self.compressed.weights else None


class PickledSource(Source):
    """A folder of torch pickles; "semi-structured" where some weights are torch's 2:4 tensors."""

    def __init__(self, checkpoint: PickledCheckpoint, model: str):
        super().__init__(checkpoint, model)
        if any(tensor.semi_structured for tensor in checkpoint.tensors.values()):
            self.kind = "semi-structured"

    def stored_mask(self, name: str) -> Tensor | None:
        return self.checkpoint.mask(name)

    def digest(self) -> str:
        return self.checkpoint.digest()

    def file_times(self) -> list[list[int]]:
        stats = [file.stat() for file in self.checkpoint.files]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def open_source(model: str | Path, revision: str | None = None) -> Source:
    """Open a folder or hub id to convert from.

    Where there are no safetensors, pickled weights are read, tensors only. Raises ``UserError`` for a sparse-rt folder
    (there is nothing to convert), a quantized model or a pickle with other objects, ``FormatError`` for damaged files.
    """
    folder = resolve_model(model, revision)
    config = read_json(folder / "config.json")
    stored = {key: config[key] for key in CONFIG_KEYS if config.get(key)}
    method = (stored.get("quantization_config") or {}).get("quant_method")
    if method == QUANT_METHOD:
        raise UserError(
            f"{model} is a sparse-rt model already, there is nothing to convert; `sparse-rt merge` folds an adapter "
            "in, `sparse-rt export --to dense` makes a dense folder to prune again"
        )
    format_name = sparsity_format(stored)
    if stored and format_name is None:
        raise UserError(
            f"{model} is stored by {method or 'another quantization method'}, sparse-rt reads plain bfloat16, float16 "
            "and float32 weights; convert the unquantized model"
        )
    if not list(folder.glob("*.safetensors*")) and pickled_files(folder):
        if stored and is_sparse_format(format_name):
            raise UserError(f"{model} is stored as {format_name}, which is read from safetensors, not from pickles")
        return PickledSource(PickledCheckpoint(folder), str(model))
    checkpoint = SourceCheckpoint.open(folder)
    if stored and is_sparse_format(format_name):
        return CompressedTensorsSource(checkpoint, str(model))
    return Source(checkpoint, str(model))
