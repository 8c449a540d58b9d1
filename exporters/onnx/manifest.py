"""``sparse_rt.json`` of an exported folder: where it comes from, how it was made, and what every layer is."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, file_digest, read_json, write_json
from sparse_rt.checkpoint.config import Producer
from sparse_rt.exporters.onnx.assemble import Assembler
from sparse_rt.exporters.onnx.functions import VERSION
from sparse_rt.exporters.onnx.graph import all_nodes
from sparse_rt.exporters.onnx.skeleton import Weight

NAME = "sparse_rt.json"
_TOOLS = ("onnx", "onnxscript", "torch", "transformers", "onnxruntime", "onnxruntime-genai")


def write_manifest(folder: Path, checkpoint: Checkpoint, facts: dict[str, Any], layers: dict[str, Any]) -> None:
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
        "layers": layers,
        "check": None,
    }
    write_json(folder / NAME, described)


def describe_layers(assembler: Assembler, weights: dict[str, Weight]) -> dict[str, Any]:
    """What each node of the assembled graph that stands for a module of ``weights`` is."""
    nodes = {node.name for node in all_nodes(assembler.proto.graph)}
    return {name: _layer(name, weights[name], assembler) for name in sorted(nodes & weights.keys())}


def _layer(name: str, weight: Weight, assembler: Assembler) -> dict[str, Any]:
    if weight.kind != "sparse":
        tied = f"shares the weight of {weight.owner}" if weight.owner != name else None
        return {"dense": tied or ("an embedding" if weight.kind == "embedding" else "dense in the checkpoint (ignore)")}
    entry, how = assembler.entry_of(weight), assembler.quantization
    described = {"pattern": entry.pattern, "shape": [entry.m, entry.n], "nnz": entry.nnz}
    members = assembler.members_of(weight)
    if len(members) > 1:
        described["joins"] = members
    if assembler.form == "dense":
        return {"dense": "form=dense", **described}
    if how.is_int8(entry):
        return {**described, "values": "int8", "group_size": how.group_size_of(entry)}
    return {**described, "values": str(entry.dtype).removeprefix("torch.")}


def add_check(folder: Path, figures: dict[str, Any]) -> None:
    """Keep the figures of a check that was passed."""
    if (folder / NAME).is_file():
        write_json(folder / NAME, {**read_json(folder / NAME), "check": figures})


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
