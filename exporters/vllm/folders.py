"""The three kinds of folders that the plugin serves, and what each says about a weight.

    SparseFolder              made by `sparse-rt convert`
    CompressedTensorsFolder   sparse-bitmask or sparse-24-bitmask, which vLLM itself has refused since 2026
    DenseFolder               pruned but stored dense: `--quantization sparse_rt` compresses it while it is loaded

Nothing here knows vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparse_rt.checkpoint import (
    QUANT_METHOD,
    Checkpoint,
    SourceCheckpoint,
    SparseConfig,
    TensorEntry,
    matches,
    read_json,
)
from sparse_rt.checkpoint.compressed_tensors import CompressedTensors, is_sparse_format, sparsity_format
from sparse_rt.exporters.vllm import parallel
from sparse_rt.exporters.vllm.encodings import BITMASK, BITMASK_NAME, CANONICAL, DENSE, TWO_FOUR, UNSTRUCTURED, Int8
from sparse_rt.exporters.vllm.loading import StoredWeight
from sparse_rt.formats import VALUES_NAME, get_format
from sparse_rt.formats.int8 import INT8

# Sparsity of dummy weights when no header says it.
DEFAULT_SPARSITY = 0.5


class ServedFolder(ABC):
    """What a folder says about its weights, by the names that the modules have there.

    ``sparsities`` (of the compressed weights), ``shapes`` and ``files`` (of all matrices) are known once the headers
    were read: None and empty for a hub model, whose files may not be on this machine yet.
    """

    # Endings of tensor names -> what the placeholders of a layer are called; None: not needed.
    renamed: dict[str, str | None] = {}

    def __init__(self) -> None:
        self.sparsities: dict[str, float] | None = None
        self.shapes: dict[str, tuple[int, int]] = {}
        self.files: dict[str, str] = {}

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Read and check the headers; ``FormatError`` for missing, extra and truncated tensors."""

    @abstractmethod
    def weight(self, name: str) -> StoredWeight | None:
        """The compressed weight of module ``name``, None when it is stored and served dense."""

    def parallel_refusal(self, heads: parallel.Heads | None, size: int, expert_parallel: bool = False) -> str | None:
        """None, or why ``size`` tensor-parallel ranks cannot share the weights, with the sizes that could."""
        weights = {}
        for name, (m, n) in self.shapes.items():
            stored = self.weight(name)
            weights[name] = parallel.Weight(m, n, stored.pattern if stored else None)
        return parallel.refusal(weights, heads, size, expert_parallel)

    def _describe(self, name: str, shape: tuple[int, ...], file: Path) -> None:
        self.shapes[name], self.files[name] = (shape[0], shape[-1]), file.name

    def _describe_dense(self, names: Iterable[str], tensors: dict[str, TensorEntry]) -> None:
        for name in names:
            if name.endswith(".weight") and len(tensors[name].shape) == 2:
                self._describe(name.removesuffix(".weight"), tensors[name].shape, tensors[name].file)


class SparseFolder(ServedFolder):
    def __init__(self, sparse: SparseConfig):
        super().__init__()
        self.sparse = sparse
        self.dtypes: dict[str, torch.dtype] = {}  # of every compressed weight, once the headers were read

    def __repr__(self) -> str:
        return f"pattern={self.sparse.pattern!r}, values={self.sparse.values!r}, ignore={self.sparse.ignore}"

    def read(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        self.sparsities = {name: weight.sparsity for name, weight in checkpoint.weights.items()}
        for name, weight in checkpoint.weights.items():
            self._describe(name, (weight.m, weight.n), weight.file)
            self.dtypes[name] = weight.dtype
        self._describe_dense(checkpoint.dense_tensors(), checkpoint.tensors)

    def weight(self, name: str) -> StoredWeight | None:
        pattern = self.sparse.pattern_for(name)
        if pattern is None:
            return None
        default = get_format(pattern).default_sparsity or DEFAULT_SPARSITY
        sparsity = (self.sparsities or {}).get(name, default)
        quantized = self.sparse.values == INT8
        encoding = Int8(self.sparse.group_size, self.dtypes.get(name)) if quantized else CANONICAL
        return StoredWeight(name, pattern, sparsity, encoding, self.files.get(name, ""))


class CompressedTensorsFolder(ServedFolder):
    """``stored`` is the quantization_config of config.json."""

    renamed = {
        f"{prefix}.{part}": new and f".{new}"
        for prefix in (".weight", "")
        for part, new in (
            ("compressed", VALUES_NAME),
            ("bitmask", BITMASK_NAME),
            ("shape", None),
            ("row_offsets", None),
        )
    }

    def __init__(self, stored: dict[str, Any]):
        super().__init__()
        sparsity = stored.get("sparsity_config") or {}
        self.format, self.ignore = sparsity.get("format"), list(sparsity.get("ignore") or [])
        self.pattern = TWO_FOUR if self.format == "sparse-24-bitmask" else UNSTRUCTURED

    def __repr__(self) -> str:
        return f"compressed-tensors {self.format}, ignore={self.ignore}"

    @staticmethod
    def describes(stored: dict[str, Any]) -> bool:
        """Whether a quantization_config is that of such a folder; ``UserError`` where it is quantized as well."""
        return is_sparse_format(sparsity_format({"quantization_config": stored}))

    def read(self, folder: Path) -> None:
        checkpoint = SourceCheckpoint.open(folder)
        compressed = CompressedTensors(checkpoint)
        found = {name.removesuffix(".weight"): weight for name, weight in compressed.weights.items()}
        self.sparsities = {name: 1 - w.nnz / (w.shape[0] * w.shape[-1]) for name, w in found.items()}
        for name, weight in found.items():
            self._describe(name, weight.shape, checkpoint.tensors[f"{weight.prefix}.compressed"].file)
        self._describe_dense((n for n in checkpoint.tensors if n not in compressed.parts), checkpoint.tensors)

    def weight(self, name: str) -> StoredWeight | None:
        if self.sparsities is not None:
            dense = name not in self.sparsities
        else:
            dense = any(matches(name, pattern) for pattern in self.ignore)
        sparsity = (self.sparsities or {}).get(name, DEFAULT_SPARSITY)
        return None if dense else StoredWeight(name, self.pattern, sparsity, BITMASK, self.files.get(name, ""))


class DenseFolder(ServedFolder):
    """Every linear weight is looked at; what turns out to be dense is served dense."""

    def __repr__(self) -> str:
        return "compressed while loading"

    def read(self, folder: Path) -> None:
        checkpoint = SourceCheckpoint.open(folder)
        self._describe_dense(checkpoint.tensors, checkpoint.tensors)

    def weight(self, name: str) -> StoredWeight | None:
        return StoredWeight(name, UNSTRUCTURED, DEFAULT_SPARSITY, DENSE, self.files.get(name, ""))


def open_description(config: dict[str, Any]) -> ServedFolder:
    """The kind of folder whose config.json holds this quantization_config; ``FormatError`` for an unknown key.

    ``UserError`` for wrapped weights.
    """
    if not config:
        return DenseFolder()
    if config.get("quant_method") == QUANT_METHOD:
        sparse = SparseConfig.from_dict(config)
        sparse.refuse_wrapper("sparse_rt: vLLM cannot serve")
        return SparseFolder(sparse)
    return CompressedTensorsFolder(config)


def open_folder(folder: Path) -> tuple[ServedFolder, parallel.Heads | None]:
    """A local folder, its headers read and checked, and the attention heads of its model."""
    config = read_json(folder / "config.json")
    served = open_description(config.get("quantization_config") or config.get("compression_config") or {})
    served.read(folder)
    return served, parallel.heads_of({**config, **(config.get("text_config") or {})})
