"""What every exported folder needs beside the weights, and how its size is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import INDEX_NAME, MANIFEST_NAME, read_json, write_json

_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_OWN = ("config.json", INDEX_NAME, MANIFEST_NAME)


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
