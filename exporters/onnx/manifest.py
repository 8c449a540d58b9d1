"""``sparse_rt.json`` of an exported folder: where it comes from, how it was made, and what every layer is."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, file_digest, read_json, write_json
from sparse_rt.checkpoint.config import Producer
from sparse_rt.exporters.onnx.functions import VERSION
from sparse_rt.exporters.onnx.skeleton import Weight

NAME = "sparse_rt.json"
_TOOLS = ("onnx", "onnxscript", "torch", "transformers", "onnxruntime", "onnxruntime-genai")


def write_manifest(
    folder: Path, checkpoint: Checkpoint, facts: dict[str, Any], weights: dict[str, Weight], how: Any
) -> None:
    """Write the manifest of ``folder``, without the result of a check, which ``add_check`` puts in."""
    source = checkpoint.folder / MANIFEST_NAME
    described = {
        "operators_version": VERSION,
        "producer": str(Producer()),
        "source": {
            "name": checkpoint.folder.name,
            "manifest_sha256": file_digest(source) if source.is_file() else None,
        },
        "export": facts,
        "versions": _versions(),
        "layers": {name: _layer(name, weight, checkpoint, how) for name, weight in sorted(weights.items())},
        "check": None,
    }
    write_json(folder / NAME, described)


def add_check(folder: Path, figures: dict[str, Any]) -> None:
    """Keep the figures of a check that was passed."""
    if (folder / NAME).is_file():
        write_json(folder / NAME, {**read_json(folder / NAME), "check": figures})


def _layer(name: str, weight: Weight, checkpoint: Checkpoint, how: Any) -> dict[str, Any]:
    keys = (name, *(key for key in checkpoint.weights if key.endswith(f".{name}") or name.endswith(f".{key}")))
    entry = next((checkpoint.weights[key] for key in keys if key in checkpoint.weights), None)
    if entry is None:
        tied = f"shares the weight of {weight.owner}" if weight.owner != name else None
        reason = tied or ("an embedding" if weight.kind == "embedding" else "dense in the checkpoint (ignore)")
        return {"dense": reason}
    int8 = how.is_int8(entry)
    return {
        "pattern": entry.pattern,
        "shape": [entry.m, entry.n],
        "nnz": entry.nnz,
        "values": "int8" if int8 else str(entry.dtype).removeprefix("torch."),
        **({"group_size": how.group_size_of(entry)} if int8 else {}),
    }


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
