"""Model folders on disk: dense sources, and sparse-rt checkpoints with every cheap check of format version 1."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_rt.checkpoint.config import FORMAT_VERSION, SparseConfig
from sparse_rt.checkpoint.header import Header, TensorEntry, read_header
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES, VALUES_NAME, get_format, int8
from sparse_rt.formats import wrapper as wrappers
from sparse_rt.formats.wrapper import Wrapper

INDEX_NAME = "sparse_rt.safetensors.index.json"
MANIFEST_NAME = "sparse_rt.manifest.json"
_INDEX_NAMES = (INDEX_NAME, "model.safetensors.index.json")


@dataclass(frozen=True)
class WeightEntry:
    """One compressed weight: its pattern, dense shape (m, n), number of kept values and value dtype.

    Where ``values`` is "int8", ``dtype`` is what they are widened to and ``group_size`` the columns of a scale (None:
    a scale a row). ``wrapper``: rows and columns of the blocks of its wrapper, None without one.
    """

    pattern: str
    m: int
    n: int
    nnz: int
    dtype: torch.dtype
    file: Path
    values: str = int8.PLAIN
    group_size: int | None = None
    wrapper: tuple[int, int] | None = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The stored tensors without the name of the weight: values, metadata, and int8 values' scales or a wrapper."""
        return stored_names(self.pattern, self.values, self.wrapper is not None)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / (self.m * self.n)

    @property
    def dense_bytes(self) -> int:
        return self.m * self.n * self.dtype.itemsize


def stored_names(pattern: str, values: str, wrapped: bool = False) -> tuple[str, ...]:
    names = get_format(pattern).tensor_names
    scales = (int8.SCALES_NAME,) if values == int8.INT8 else ()
    return (*names, *scales, *(wrappers.NAMES if wrapped else ()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; ``FormatError`` when it is missing or damaged."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; give a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return data


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; anything else is a hub id and is downloaded (``HF_HUB_OFFLINE`` is respected)."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; give the model's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md"]
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns))
    except (HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{model!r} is neither a local folder nor a reachable hub model ({reason})") from error


class ModelFolder:
    """Tensors of a Hugging Face model folder (safetensors only), found through the index or the single file."""

    def __init__(self, folder: Path, headers: Iterable[Header], config: dict[str, Any]):
        self.folder, self.config = folder, config
        self.headers = list(headers)
        self.tensors: dict[str, TensorEntry] = {}
        for header in self.headers:
            for name, entry in header.tensors.items():
                if name in self.tensors:
                    raise FormatError(f"tensor {name} is in {self.tensors[name].file.name} and in {entry.file.name}")
                self.tensors[name] = entry

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None):
        folder = resolve_model(model, revision)
        config = read_json(folder / "config.json")
        index = next((folder / name for name in _INDEX_NAMES if (folder / name).is_file()), None)
        if index is None:
            return cls(folder, [read_header(file) for file in _loose_files(folder)], config)
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise FormatError(f"{index}: weight_map names no file for every tensor; copy the model again")
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FormatError(f"{index.name} names {missing[0]}, which is not in {folder}; copy the model again")
        opened = cls(folder, [read_header(folder / name) for name in files], config)
        opened._check_index(index.name, weight_map)
        return opened

    def _check_index(self, index: str, weight_map: dict[str, str]) -> None:
        for name in weight_map.keys() - self.tensors.keys():
            raise FormatError(
                f"tensor {name} is missing: {index} places it in {weight_map[name]}, which does not hold it"
            )
        for name in self.tensors.keys() - weight_map.keys():
            raise FormatError(f"extra tensor {name} in {self.tensors[name].file.name}: {index} does not list it")

    def load(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        if name not in self.tensors:
            raise FormatError(f"tensor {name} is missing in {self.folder}")
        try:
            with safe_open(self.tensors[name].file, framework="pt") as file:
                return file.get_tensor(name)
        except Exception as error:  # the library raises its own type for damaged files
            raise FormatError(f"{self.tensors[name].file.name}: tensor {name} cannot be read ({error})") from error

    @property
    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())


def _loose_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = bool(list(folder.glob("*.bin")))
        hint = "; it holds pickle weights (*.bin): `sparse-rt convert` reads them, nothing else does" if pickled else ""
        raise FormatError(f"{folder} holds no *.safetensors file{hint}")
    return files


class SourceCheckpoint(ModelFolder):
    """A model to convert from: dense or pruned, not compressed by sparse-rt."""


class Checkpoint(ModelFolder):
    """A sparse-rt model folder. Opening it runs every check that needs headers only."""

    def __init__(self, folder: Path, headers: Iterable[Header], config: dict[str, Any]):
        super().__init__(folder, headers, config)
        self.quantization = SparseConfig.from_dict(config.get("quantization_config") or {})
        self.weights: dict[str, WeightEntry] = {}
        self._read_weights()
        self._check_completeness()

    def _read_weights(self) -> None:
        for header in self.headers:
            sparse = header.sparse()
            if sparse is None:
                continue
            version = sparse.get("format_version")
            if version != FORMAT_VERSION:
                raise FormatError(f"{header.file.name}: format_version {version!r}, this build reads {FORMAT_VERSION}")
            for name, described in sparse.get("weights", {}).items():
                if not isinstance(described, dict) or not _is_matrix(described.get("shape")):
                    raise FormatError(f"{header.file.name}: weight {name} is described without pattern and shape")
                self.weights[name] = self._entry(header.file.name, name, described)

    def _entry(self, file: str, name: str, described: dict[str, Any]) -> WeightEntry:
        pattern, (m, n) = described.get("pattern"), described["shape"]
        try:
            fmt = get_format(pattern)
        except UserError as error:
            raise FormatError(f"{file}: weight {name}: {error}") from error
        config = self.quantization
        stored = described.get("values", int8.PLAIN), described.get("group_size")
        if stored != (config.values, config.group_size):
            raise FormatError(
                f"{file}: weight {name} has values {stored[0]!r} and group_size {stored[1]!r}, config.json says "
                f"{config.values!r} and {config.group_size!r}; copy the folder again, or convert or export it again"
            )
        if described.get("wrapper") != config.wrapper:
            raise FormatError(
                f"{file}: weight {name} has wrapper {described.get('wrapper')!r}, config.json says {config.wrapper!r}; "
                "copy the folder again or convert the model again"
            )
        for suffix in stored_names(pattern, config.values, config.wrapper is not None):
            if f"{name}.{suffix}" not in self.tensors:
                raise FormatError(f"tensor {name}.{suffix} is missing ({file} announces a {pattern} weight {name})")
        values, metadata = (self.tensors[f"{name}.{suffix}"] for suffix in fmt.tensor_names)
        fmt.check_header(name, values.shape, metadata.shape, m, n)
        dtype = values.dtype
        if config.values == int8.INT8:
            dtype = self._widened(file, name, described, (m, n))
        if metadata.dtype != torch.uint8 or dtype not in VALUE_DTYPES:
            raise FormatError(
                f"{name}: values are {dtype} and metadata {metadata.dtype}; allowed are "
                f"{', '.join(str(d) for d in VALUE_DTYPES)} and torch.uint8"
            )
        expected = self.quantization.pattern_for(name)
        if expected != pattern:
            raise FormatError(f"weight {name} is stored as {pattern}, config.json says {expected or 'dense (ignored)'}")
        nnz = 1
        for size in values.shape:
            nnz *= size
        wrapper = None if config.wrapper is None else self._blocks(name, m, n, dtype)
        return WeightEntry(pattern, m, n, nnz, dtype, values.file, config.values, config.group_size, wrapper)

    def _blocks(self, name: str, m: int, n: int, dtype: torch.dtype) -> tuple[int, int]:
        """Block sizes of the wrapper of weight ``name``; ``FormatError`` where a header is wrong."""
        found = [self.tensors[f"{name}.{suffix}"] for suffix in wrappers.NAMES]
        return wrappers.check_header(name, [e.dtype for e in found], [e.shape for e in found], m, n, dtype)

    def _widened(self, file: str, name: str, described: dict[str, Any], shape: tuple[int, int]) -> torch.dtype:
        """The dtype that the int8 values of weight ``name`` are widened to; ``FormatError`` where a header is wrong."""
        values, scales = (self.tensors[f"{name}.{suffix}"] for suffix in (VALUES_NAME, int8.SCALES_NAME))
        int8.check_header(name, (values.dtype, scales.dtype), scales.shape, *shape, self.quantization.group_size)
        dtype = described.get("dtype")
        if not isinstance(dtype, str) or dtype not in int8.DTYPE_NAMES:
            raise FormatError(
                f"{file}: int8 weight {name} has dtype {dtype!r}; allowed are {', '.join(int8.DTYPE_NAMES)}; "
                f"{int8.REMEDY}"
            )
        return int8.DTYPE_NAMES[dtype]

    def _check_completeness(self) -> None:
        known = self.compressed_tensors()
        for tensor in self.tensors:
            prefix, _, suffix = tensor.rpartition(".")
            if tensor not in known and suffix in (VALUES_NAME, "weight_meta", "weight_bitmask", *wrappers.NAMES):
                raise FormatError(f"extra tensor {tensor}: no shard header announces a compressed weight {prefix}")
            # Elsewhere the name of scales may be one of the model's own.
            quantized = self.quantization.values == int8.INT8
            if suffix == int8.SCALES_NAME and tensor not in known and (quantized or prefix in self.weights):
                raise FormatError(f"extra tensor {tensor}: {prefix} is no weight with int8 values")
            if suffix == "weight" and prefix in self.weights:
                raise FormatError(f"extra tensor {tensor}: the weight {prefix} is stored compressed as well")
        if not self.weights:
            raise FormatError(
                f"{self.folder}: config.json says sparse_rt, but no shard header announces a compressed weight"
            )

    def compressed_tensors(self) -> set[str]:
        """Names of the values, metadata, scales and wrappers of all compressed weights."""
        return {f"{name}.{part}" for name, weight in self.weights.items() for part in weight.tensor_names}

    def stored_bytes(self, name: str) -> int:
        """What the tensors of one compressed weight take."""
        return sum(self.tensors[f"{name}.{part}"].nbytes for part in self.weights[name].tensor_names)

    def load_weight(self, name: str, check: bool = True) -> tuple[Tensor, Tensor]:
        """(values, metadata) of one compressed weight; ``check`` tests popcount, nibbles, padding and finiteness.

        int8 values are widened to the dtype of the entry. ``UserError`` for a wrapped weight, of which these two are
        the core only: ``load_core`` and ``load_dense`` read it.
        """
        entry = self._weight(name)
        if entry.wrapper is not None:
            self.quantization.refuse_wrapper(f"{name} cannot be read as values and metadata: {self.folder} has")
        fmt, shape = get_format(entry.pattern), (entry.m, entry.n)
        if entry.values == int8.INT8:
            q, scales, metadata = self.load_quantized(name, check=False)
            weight = fmt, q, scales, metadata, *shape, entry.group_size, entry.dtype
            return int8.widen(name, *weight) if check else int8.dequantize(*weight), metadata
        values, metadata = (self.load(f"{name}.{suffix}") for suffix in entry.tensor_names)
        if check:
            fmt.check_data(name, values, metadata, *shape)
        return values, metadata

    def load_core(self, name: str, check: bool = True) -> tuple[Tensor, Tensor, Wrapper | None]:
        """(values, metadata, wrapper) of any compressed weight, checked as ``load_weight`` does; None: no wrapper."""
        entry = self._weight(name)
        if entry.wrapper is None:
            return *self.load_weight(name, check), None
        values, metadata, *matrices = (self.load(f"{name}.{suffix}") for suffix in entry.tensor_names)
        wrapper = Wrapper(*matrices)
        if check:
            get_format(entry.pattern).check_data(name, values, metadata, entry.m, entry.n)
            wrappers.check_data(name, wrapper)
        return values, metadata, wrapper

    def load_dense(self, name: str) -> Tensor:
        """The weight [m, n] that compressed weight ``name`` stands for, checked: with a wrapper, A S B."""
        entry = self._weight(name)
        values, metadata, wrapper = self.load_core(name)
        dense = get_format(entry.pattern).decompress(values, metadata, entry.m, entry.n)
        return dense if wrapper is None else wrapper.dense(dense)

    def load_quantized(self, name: str, check: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(q int8, scales float32 [m, g], metadata) of one weight with int8 values, checked as ``load_weight`` does."""
        entry = self._weight(name)
        if entry.values != int8.INT8:
            raise UserError(f"weight {name} of {self.folder} has {entry.values} values; load_weight reads them")
        q, metadata, scales = (self.load(f"{name}.{suffix}") for suffix in entry.tensor_names)
        if check:
            fmt = get_format(entry.pattern)
            int8.check_data(name, fmt, q, scales, metadata, entry.m, entry.n, entry.group_size)
        return q, scales, metadata

    def _weight(self, name: str) -> WeightEntry:
        if name not in self.weights:
            raise UserError(f"{name} is not a compressed weight of {self.folder}")
        return self.weights[name]

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of the dense model, by the names that they have there."""
        shapes = {f"{name}.weight": (weight.m, weight.n) for name, weight in self.weights.items()}
        return shapes | {name: self.tensors[name].shape for name in self.dense_tensors()}

    def dense_tensors(self) -> list[str]:
        """Names of the tensors stored as they were (embeddings, norms, biases, ignored weights)."""
        compressed = self.compressed_tensors()
        return [name for name in self.tensors if name not in compressed]


def _is_matrix(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)


def is_sparse_checkpoint(folder: str | Path) -> bool:
    """Whether ``folder`` is a local model whose config.json routes to sparse-rt."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    described = read_json(config).get("quantization_config") or {}
    if not isinstance(described, dict):
        raise FormatError(f"{config}: quantization_config is {described!r}; expected a JSON object")
    return described.get("quant_method") == "sparse_rt"
