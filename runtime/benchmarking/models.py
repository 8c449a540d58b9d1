"""The two sides of a benchmark: the compressed folder and the dense one it is compared with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint, is_sparse_checkpoint, resolve_model
from sparse_rt.checkpoint.reader import ModelFolder
from sparse_rt.errors import UserError
from sparse_rt.exporters.dense import DenseExporter
from sparse_rt.report import size

# What must agree for a comparison to mean anything.
SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Pair:
    """Folders of both sides; ``given`` tells whether the user chose the baseline."""

    sparse: Checkpoint
    dense: ModelFolder
    given: bool

    @property
    def dtype(self) -> str:
        """The dtype both sides run in: that of the compressed model."""
        config = text_config(self.sparse)
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def positions(self) -> int | None:
        """The longest sequence the model takes, where its config says so."""
        return text_config(self.sparse).get("max_position_embeddings")

    @property
    def vocabulary(self) -> int:
        return text_config(self.sparse)["vocab_size"]


@contextmanager
def open_pair(model: str, baseline: str | None) -> Iterator[Pair]:
    """Both sides, the baseline decompressed into a temporary folder when none is given.

    Raises ``UserError`` for a dense model, a compressed baseline, or a baseline of another architecture or size.
    """
    folder = resolve_model(model)
    if not is_sparse_checkpoint(folder):
        raise UserError(
            f"{model} is dense; bench compares a compressed model with a dense one, "
            "make one with `sparse-rt convert` and give the dense one as --baseline"
        )
    sparse = Checkpoint.open(folder)
    if baseline is not None:
        yield Pair(sparse, open_baseline(baseline, sparse), given=True)
        return
    needed = sparse.total_bytes + sum(weight.dense_bytes for weight in sparse.weights.values())
    with temporary_folder(needed, "the decompressed baseline", "or give --baseline") as temporary:
        DenseExporter().export(folder, temporary)
        yield Pair(sparse, SourceCheckpoint.open(temporary), given=False)


@contextmanager
def temporary_folder(needed: int, what: str, other_way: str) -> Iterator[Path]:
    """A temporary folder with room for ``needed`` bytes; ``UserError`` when the disk is too full."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise UserError(
            f"{what} needs {size(needed)} in {tempfile.gettempdir()}, {size(free)} are free; "
            f"set TMPDIR to a larger disk{', ' + other_way if other_way else ''}"
        )
    with tempfile.TemporaryDirectory(prefix="sparse-rt-bench-") as folder:
        yield Path(folder)


def open_baseline(baseline: str, sparse: Checkpoint) -> SourceCheckpoint:
    """The dense folder of ``baseline``, checked against ``sparse``."""
    folder = resolve_model(baseline)
    if is_sparse_checkpoint(folder):
        raise UserError(f"baseline {baseline} is compressed; give the dense model, or leave --baseline out")
    dense = SourceCheckpoint.open(folder)
    for key in SAME:
        ours, theirs = text_config(sparse).get(key), text_config(dense).get(key)
        if ours != theirs:
            raise UserError(
                f"baseline {baseline} has {key} {theirs!r}, the model has {ours!r}; "
                "give the dense model it was converted from"
            )
    return dense


def text_config(folder: ModelFolder) -> dict[str, Any]:
    """config.json, with the part about the language model of a multimodal one on top."""
    return {**folder.config, **(folder.config.get("text_config") or {})}


def file_bytes(folder: ModelFolder) -> int:
    """Bytes of the weight files."""
    return sum(header.file.stat().st_size for header in folder.headers)


def read_files(files: Iterable[Path]) -> None:
    """Bring ``files`` into the page cache, so that the disk does not decide which side loads faster."""
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
