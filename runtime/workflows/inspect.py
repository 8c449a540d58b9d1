"""``sparse-rt inspect``: what is inside a model folder, compressed or dense."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, is_sparse_checkpoint, read_json, resolve_model
from sparse_rt.config import InspectOptions
from sparse_rt.conversion import Source, open_source, read_structure
from sparse_rt.conversion import structure as kinds
from sparse_rt.conversion.detect import GROUPS, detect, kept_positions
from sparse_rt.errors import UserError
from sparse_rt.optional import require
from sparse_rt.progress import Progress


def inspect(options: InspectOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Headers of a sparse-rt folder; for any other folder the zeros of every linear weight (reads the data).

    Raises ``FormatError`` for damaged files, ``UserError`` when ``--plot`` lacks matplotlib.
    """
    progress = progress or Progress()
    folder = resolve_model(options.model)
    if is_sparse_checkpoint(folder):
        result = inspect_sparse(Checkpoint.open(folder))
    else:
        result = inspect_dense(open_source(folder), progress)
    result = {"model": options.model, **result}
    if options.plot:
        plot(result, options.plot)
        result["plot"] = str(options.plot)
    return result


def inspect_sparse(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest_path = checkpoint.folder / MANIFEST_NAME
    manifest = read_json(manifest_path) if manifest_path.is_file() else {}
    weights = []
    for name, entry in checkpoint.weights.items():
        stored = checkpoint.stored_bytes(name)
        weights.append(
            {
                "name": name,
                "pattern": entry.pattern,
                "shape": [entry.m, entry.n],
                "dtype": str(entry.dtype).removeprefix("torch."),
                "values": entry.values,
                "wrapper": None if entry.wrapper is None else list(entry.wrapper),
                "sparsity": round(entry.sparsity, 6),
                "bytes": stored,
                "dense_bytes": entry.dense_bytes,
                "compression": round(stored / entry.dense_bytes, 4),
            }
        )
    skipped, notes = _skipped(checkpoint, manifest)
    if checkpoint.quantization.wrapper is not None:
        notes.append("sparsity is that of the cores; the products with their wrappers have no zeros")
    dense = sum(w["dense_bytes"] for w in weights)
    stored = sum(w["bytes"] for w in weights)
    linear = dense + sum(s["bytes"] for s in skipped)
    elements = sum(w["shape"][0] * w["shape"][1] for w in weights)
    return {
        "kind": "sparse-rt",
        "pattern": checkpoint.quantization.pattern,
        "values": checkpoint.quantization.values,
        "group_size": checkpoint.quantization.group_size,
        "wrapper": checkpoint.quantization.wrapper,
        "producer": str(checkpoint.quantization.producer),
        "source": manifest.get("source"),
        "options": manifest.get("options"),
        "weights": weights,
        "skipped": skipped,
        "totals": {
            "bytes": checkpoint.total_bytes,
            "dense_bytes": checkpoint.total_bytes - stored + dense,
            "ratio": round(checkpoint.total_bytes / (checkpoint.total_bytes - stored + dense), 4),
            "compressed_weights": len(weights),
            "linear_weights": len(weights) + len(skipped),
            "mean_sparsity": round(sum(w["sparsity"] * w["shape"][0] * w["shape"][1] for w in weights) / elements, 6),
            "coverage_percent": round(100 * dense / linear, 2),
        },
        "notes": notes,
    }


def _skipped(checkpoint: Checkpoint, manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Linear weights stored dense, with the reason the conversion gave or what the config says."""
    reasons = {entry["name"]: entry["reason"] for entry in manifest.get("skipped", [])}
    notes = []
    try:
        structure = read_structure(checkpoint.folder, checkpoint.dense_shapes())
        linear = {
            key for key in checkpoint.dense_tensors() if structure.kind(key, _dim(checkpoint, key)) != kinds.OTHER
        }
    except UserError as error:
        linear = {f"{name}.weight" for name in reasons}
        notes.append(f"skipped modules are those of the manifest: {error}")
    skipped = []
    for key in checkpoint.dense_tensors():
        name = key.removesuffix(".weight")
        if key in linear:
            ignored = checkpoint.quantization.pattern_for(name) is None
            reason = reasons.get(name) or ("ignored by config.json" if ignored else "stored dense")
            entry = checkpoint.tensors[key]
            skipped.append({"name": name, "shape": list(entry.shape), "bytes": entry.nbytes, "reason": reason})
    return skipped, notes


def _dim(checkpoint: Checkpoint, key: str) -> int:
    return len(checkpoint.tensors[key].shape)


def inspect_dense(source: Source, progress: Progress) -> dict[str, Any]:
    """Sparsity and obeyed patterns of every linear weight, and the options of ``convert`` that fit them."""
    structure = read_structure(source.folder, source.shapes)
    keys = [
        key
        for key, tensor in source.tensors.items()
        if len(tensor.shape) == 2 and structure.kind(key, 2) not in (kinds.OTHER, kinds.TIED)
    ]
    weights = []
    for key in progress.track(keys, "counting zeros", total=len(keys)):
        tensor = source.tensors[key]
        kept = kept_positions(source, key)
        weights.append(
            {
                "name": key.removesuffix(".weight"),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "dense_bytes": tensor.numel * tensor.dtype.itemsize,
                "sparsity": round(1 - int(kept.sum()) / kept.numel(), 6),
                "obeys": obeyed_patterns(kept),
                "detected": detect(kept).pattern,
            }
        )
    elements = sum(torch.Size(w["shape"]).numel() for w in weights)
    zeros = sum(w["sparsity"] * torch.Size(w["shape"]).numel() for w in weights)
    return {
        "kind": source.kind,
        "weights": weights,
        "totals": {
            "bytes": source.checkpoint.total_bytes,
            "linear_weights": len(weights),
            "linear_bytes": sum(w["dense_bytes"] for w in weights),
            "mean_sparsity": round(zeros / elements, 6) if elements else 0.0,
        },
        "suggestion": suggestion(weights),
        "notes": ["not a sparse-rt model: these are the zeros of its weights"],
    }


def obeyed_patterns(kept: Tensor) -> list[str]:
    """Every N:M with M in ``GROUPS`` and the smallest possible N < M that bool ``kept`` [m, n] obeys."""
    m, n = kept.shape
    found = []
    for group in GROUPS:
        if n % group == 0:
            most = max(int(kept.view(m, n // group, group).sum(-1).max()), 1)
            if most < group:
                found.append(f"{most}:{group}")
    return found


def suggestion(weights: list[dict[str, Any]]) -> str:
    """How to convert a model with these weights; the head is left dense anyway."""
    found = Counter(w["detected"] for w in weights if w["name"] != "lm_head")
    if not any(found):
        return "the weights are dense: choose a method, for example convert --method wanda --pattern 2:4"
    if len(found) == 1:
        return f"the weights are pruned: convert --method none --pattern {next(iter(found))}"
    counted = ", ".join(f"{count} {pattern or 'dense'}" for pattern, count in found.most_common())
    return f"the weights are pruned: convert --method none, which finds {counted}"


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar per weight, coloured by pattern."""
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure

    weights = result["weights"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    patterns = [w.get("pattern") or (w.get("obeys") or ["dense or unstructured"])[0] for w in weights]
    for pattern in dict.fromkeys(patterns):
        places = [place for place, found in enumerate(patterns) if found == pattern]
        axes.bar(places, [100 * weights[place]["sparsity"] for place in places], width=0.9, label=pattern)
    axes.set(xlabel="linear weight, in checkpoint order", ylabel="sparsity in percent", ylim=(0, 100))
    axes.set_title(f"{Path(result['model']).name}: sparsity of {len(weights)} weights")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
