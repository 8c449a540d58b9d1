"""What every exported folder needs beside the weights, how its size is told, and what its check compares with."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import INDEX_NAME, MANIFEST_NAME, Checkpoint, read_json, write_json

_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_OWN = ("config.json", INDEX_NAME, MANIFEST_NAME)
_EXPERTS = "experts"


def copy_side_files(source: Path, output: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and licence of ``source``; returns their names."""
    copied = []
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _SUFFIXES and not file.name.endswith(".index.json") and file.name not in _OWN
        if file.is_file() and (wanted or file.name.upper().startswith("LICENSE")):
            shutil.copyfile(file, output / file.name)
            copied.append(file.name)
    return copied


def write_dense_config(source: Path, output: Path) -> dict[str, Any]:
    """Write the model's config.json without its ``quantization_config``; returns it."""
    config = {k: v for k, v in read_json(source / "config.json").items() if k != "quantization_config"}
    write_json(output / "config.json", config)
    return config


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below ``folder``, by relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def reference_model(folder: Path, **options: Any) -> Any:
    """The sparse-rt folder in transformers; with the same weights dense where it cannot hold them compressed (experts).

    ``options`` go to ``from_pretrained``.
    """
    from sparse_rt.exporters.dense import DenseExporter  # which needs this module
    from sparse_rt.hf.load import load

    if not any(_EXPERTS in name.split(".") for name in Checkpoint.open(folder).weights):
        return load(folder, **options)
    with tempfile.TemporaryDirectory(prefix="sparse-rt-dense-") as dense:
        DenseExporter().export(Path(folder), Path(dense))
        return load(dense, **options)
