"""Weights that one operator reads together: q, k and v of a layer are one MatMul in the graphs of onnxruntime-genai.

Their matrices are stacked by rows, compressed ones without decompressing them. The node says whose rows it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.exporters.onnx.functions import DOMAIN
from sparse_rt.formats import get_format

# Key of a node's metadata_props; the value is the modules, divided by commas.
ROWS = f"{DOMAIN}.rows"

# Joined module -> the modules it is made of, first rows first.
Groups = dict[str, tuple[str, ...]]


def can_join(checkpoint: Checkpoint, modules: Iterable[str], limit: int) -> bool:
    """Whether ``modules`` (names of the checkpoint) share one operator: stored alike, below ``limit`` together."""
    entries = [checkpoint.weights.get(name) or checkpoint.tensors.get(f"{name}.weight") for name in modules]
    if None in entries:
        return False
    shapes = [entry.shape if hasattr(entry, "shape") else (entry.m, entry.n) for entry in entries]
    alike = ("pattern", "dtype", "values", "group_size")
    kinds = {tuple(getattr(entry, name, None) for name in alike) for entry in entries}
    return len(kinds) == 1 and sum(m * n for m, n in shapes) < limit


class JoinedCheckpoint:
    """What an export reads of ``checkpoint``, the weights of every group (names of the checkpoint) joined to one.

    See ``can_join`` for what may be joined; methods are those of ``Checkpoint``.
    """

    def __init__(self, checkpoint: Checkpoint, groups: Groups):
        self._parts, self._groups = checkpoint, groups
        self.weights, self.tensors = dict(checkpoint.weights), dict(checkpoint.tensors)
        for name, parts in groups.items():
            if parts[0] in checkpoint.weights:
                entries = [self.weights.pop(part) for part in parts]
                rows, kept = sum(entry.m for entry in entries), sum(entry.nnz for entry in entries)
                self.weights[name] = dataclasses.replace(entries[0], m=rows, nnz=kept)
            else:
                found = [self.tensors.pop(f"{part}.weight") for part in parts]
                shape = (sum(entry.shape[0] for entry in found), found[0].shape[1])
                self.tensors[f"{name}.weight"] = dataclasses.replace(found[0], shape=shape)

    def members(self, name: str) -> dict[str, int]:
        """What a compressed weight was joined from, itself if from nothing: name in the checkpoint -> rows."""
        return {part: self._parts.weights[part].m for part in self._groups.get(name, (name,))}

    def load(self, name: str) -> Tensor:
        parts = self._groups.get(name.removesuffix(".weight"))
        return self._parts.load(name) if parts is None else torch.cat([self._parts.load(f"{p}.weight") for p in parts])

    def load_weight(self, name: str, check: bool = True) -> tuple[Tensor, Tensor]:
        parts, entry = self._groups.get(name), self.weights[name]
        if parts is None:
            return self._parts.load_weight(name, check)
        pieces = [(*self._parts.load_weight(part, check), self._parts.weights[part].m) for part in parts]
        return get_format(entry.pattern).concat_rows(pieces, entry.n)

    def load_quantized(self, name: str, check: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        parts, entry = self._groups.get(name), self.weights[name]
        if parts is None:
            return self._parts.load_quantized(name, check)
        found = [self._parts.load_quantized(part, check) for part in parts]
        rows = [self._parts.weights[part].m for part in parts]
        pieces = [(q, metadata, m) for (q, _, metadata), m in zip(found, rows, strict=True)]
        q, metadata = get_format(entry.pattern).concat_rows(pieces, entry.n)
        return q, torch.cat([scales for _, scales, _ in found]), metadata


def note(proto: Any, groups: Groups) -> None:
    """Write ``groups`` into the nodes of ``proto`` (``onnx.ModelProto``) that carry the names of joined modules."""
    for node in proto.graph.node:
        if node.name in groups:
            node.metadata_props.add(key=ROWS, value=",".join(groups[node.name]))


def noted(proto: Any) -> Groups:
    """What ``note`` wrote; {} for other models."""
    found = (
        (node.name, entry.value) for node in proto.graph.node for entry in node.metadata_props if entry.key == ROWS
    )
    return {name: tuple(value.split(",")) for name, value in found}
