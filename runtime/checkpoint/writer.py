"""Writing a sparse-rt checkpoint shard by shard, the index last; memory holds no more than the tensor of the moment.

Finished shards are recorded in a journal, so an interrupted conversion goes on where it stopped; the journal carries a
fingerprint of source, options and version, and another fingerprint is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint.config import FORMAT_VERSION, SparseConfig
from sparse_rt.checkpoint.header import METADATA_KEY
from sparse_rt.checkpoint.output import fsync
from sparse_rt.checkpoint.reader import INDEX_NAME, MANIFEST_NAME
from sparse_rt.checkpoint.shard import OpenShard
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.formats import wrapper as wrappers
from sparse_rt.formats.int8 import INT8, SCALES_NAME
from sparse_rt.formats.wrapper import Wrapper

JOURNAL_NAME = "progress.json"


def sparse_header(weights: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Free-text header of a shard: transformers' format mark and the description of the compressed weights."""
    described = {"format_version": FORMAT_VERSION, "weights": weights}
    return {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True)}


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


@dataclass
class _Shard:
    file: str
    tensors: dict[str, str] = field(default_factory=dict)  # tensor name -> sha256
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: int = 0


class CheckpointWriter:
    """Collects tensors, writes a shard whenever the next tensor would pass ``max_shard_bytes``.

    ``config`` is the model's config.json without quantization_config; ``sparse`` describes the compressed weights.
    With ``resume`` the finished shards of an interrupted run are kept (``done`` names their tensors and weights).
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        sparse: SparseConfig | None,
        max_shard_bytes: int = 5_000_000_000,
        fingerprint: str = "",
        resume: bool = False,
    ):
        self.folder, self.config, self.sparse = Path(folder), dict(config), sparse
        self.max_shard_bytes, self.fingerprint = max_shard_bytes, fingerprint
        self._shards: list[_Shard] = self._read_journal() if resume else []
        # Beside the thread that makes the next tensors: one stores the last tensor, one hashes a finished file.
        self._hashing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sha256")
        self._pending = OpenShard(self._hashing, self.folder)
        self._pending_weights: dict[str, dict[str, Any]] = {}
        self._file_digests: dict[str, Future[str]] = {}
        self.total_bytes = sum(shard.bytes for shard in self._shards)

    @property
    def done(self) -> set[str]:
        """Names already on disk: tensors, and compressed weights under their own name."""
        return {name for shard in self._shards for name in (*shard.tensors, *shard.weights)}

    def part_file(self, weight: str) -> Path | None:
        """The finished shard that holds compressed ``weight``, or None."""
        return next((self.folder / shard.file for shard in self._shards if weight in shard.weights), None)

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self._make_room(tensor.nbytes)
        self._take(name, tensor)

    def add_weight(
        self,
        name: str,
        pattern: str,
        m: int,
        n: int,
        values: Tensor,
        metadata: Tensor,
        scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
        wrapper: Wrapper | None = None,
    ) -> None:
        """Store a compressed weight; its tensors share a shard.

        ``scales`` [m, g] and the ``dtype`` to widen to belong to int8 values, which ``sparse`` must announce, as it
        must a ``wrapper``.
        """
        quantized = self.sparse is not None and self.sparse.values == INT8
        if quantized != (scales is not None and dtype is not None):
            raise UserError(
                f"weight {name}: values 'int8' of the config and scales with a dtype come together, or neither of them"
            )
        tensors = dict(zip(get_format(pattern).tensor_names, (values, metadata), strict=True))
        described: dict[str, Any] = {"pattern": pattern, "shape": [m, n]}
        if quantized:
            tensors[SCALES_NAME] = scales
            dtype_name = str(dtype).removeprefix("torch.")
            described |= {"values": INT8, "group_size": self.sparse.group_size, "dtype": dtype_name}
        announced = None if self.sparse is None else self.sparse.wrapper
        if (announced is None) != (wrapper is None):
            raise UserError(f"weight {name}: the wrapper of the config and that of a weight come together, or neither")
        if wrapper is not None:
            tensors |= dict(zip(wrappers.NAMES, wrapper, strict=True))
            described["wrapper"] = announced
        self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        for suffix, tensor in tensors.items():
            self._take(f"{name}.{suffix}", tensor)
        self._pending_weights[name] = {**described, "nnz": values.numel()}

    def _take(self, name: str, tensor: Tensor) -> None:
        if name in self._pending or any(name in shard.tensors for shard in self._shards):
            raise UserError(f"tensor {name} was given twice")
        self._pending.add(name, tensor)

    def _make_room(self, nbytes: int) -> None:
        if self._pending and self._pending.nbytes + nbytes > self.max_shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard and record it in the journal."""
        if not self._pending:
            return
        shard = _Shard(f"part-{len(self._shards) + 1:05d}.safetensors", weights=self._pending_weights)
        shard.bytes = self._pending.nbytes
        temporary = self.folder / (shard.file + ".tmp")
        described = {name: {k: v for k, v in w.items() if k != "nnz"} for name, w in shard.weights.items()}
        shard.tensors = self._pending.write(temporary, sparse_header(described) if self.sparse else {"format": "pt"})
        fsync(temporary)
        temporary.rename(self.folder / shard.file)
        if self.sparse:
            self._file_digests[shard.file] = self._hashing.submit(file_digest, self.folder / shard.file)
        self._shards.append(shard)
        self.total_bytes += shard.bytes
        self._pending_weights = {}
        self._write_journal()

    def finish(self, manifest: dict[str, Any] | None = None) -> None:
        """Name the shards, write config, index and manifest; other files of the folder are listed in the manifest."""
        self.flush()
        known = {file: digest.result() for file, digest in self._file_digests.items()}  # before files are renamed
        self._hashing.shutdown()
        stem, index_name = ("sparse_rt", INDEX_NAME) if self.sparse else ("model", "model.safetensors.index.json")
        weight_map, names = {}, {}
        for number, shard in enumerate(self._shards, 1):
            names[shard.file] = f"{stem}-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / shard.file).rename(self.folder / names[shard.file])
            weight_map |= dict.fromkeys(shard.tensors, names[shard.file])
        digests = {names[file]: digest for file, digest in known.items()}
        config = {k: v for k, v in self.config.items() if k not in ("quantization_config", "transformers_weights")}
        if self.sparse:
            config["quantization_config"] = self.sparse.to_dict()
        write_json(self.folder / "config.json", config)
        if self.sparse:
            write_json(self.folder / MANIFEST_NAME, self._manifest(manifest or {}, digests))
        write_json(self.folder / index_name, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)

    def _manifest(self, extra: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
        """``digests`` are the sha256 of files, by name, that need not be read again for them."""
        weights = {}
        for shard in self._shards:
            for name, entry in shard.weights.items():
                weights[name] = {**entry, "sparsity": round(1 - entry["nnz"] / math.prod(entry["shape"]), 6)}
        files = {
            (name := str(file.relative_to(self.folder))): {
                "bytes": file.stat().st_size,
                "sha256": digests.get(name) or file_digest(file),
            }
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and file.name != JOURNAL_NAME and not file.name.startswith(".")
        }
        tensors = {name: digest for shard in self._shards for name, digest in shard.tensors.items()}
        head = {"format_version": FORMAT_VERSION, "producer": str(self.sparse.producer)}
        return {**head, **extra, "files": files, "tensors": tensors, "weights": weights}

    def _write_journal(self) -> None:
        shards = [vars(shard) for shard in self._shards]
        temporary = self.folder / (JOURNAL_NAME + ".tmp")
        write_json(temporary, {"fingerprint": self.fingerprint, "shards": shards})
        fsync(temporary)
        temporary.rename(self.folder / JOURNAL_NAME)

    def _read_journal(self) -> list[_Shard]:
        """The finished shards of an interrupted run, under their working names; other leftovers are removed."""
        path = self.folder / JOURNAL_NAME
        if not path.is_file():
            self._remove_leftovers([])
            return []
        journal = json.loads(path.read_text())
        if journal["fingerprint"] != self.fingerprint:
            raise UserError(
                "cannot resume: the unfinished conversion was started from another source, with other options or by "
                "another version; give the same ones, or start over with --overwrite"
            )
        shards = [_Shard(**shard) for shard in journal["shards"]]
        for number, shard in enumerate(shards, 1):
            # An interruption while finishing leaves some shards under their final names.
            for renamed in self.folder.glob(f"*-{number:05d}-of-{len(shards):05d}.safetensors"):
                renamed.rename(self.folder / shard.file)
            if not (self.folder / shard.file).is_file():
                raise UserError(f"cannot resume: {shard.file} of the unfinished conversion is gone; start over")
        self._remove_leftovers(shards)
        return shards

    def _remove_leftovers(self, shards: list[_Shard]) -> None:
        kept = {shard.file for shard in shards}
        for file in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.tmp"), *self.folder.glob("*.index.json")):
            if file.name not in kept:
                file.unlink()
