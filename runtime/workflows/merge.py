"""``sparse-rt merge``: fold an adapter into the compressed values, weight by weight, and prove it before publishing."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointWriter,
    check_output,
    file_digest,
    output_directory,
    read_json,
)
from sparse_rt.config import MergeOptions, parse_size
from sparse_rt.conversion.files import copy_small_files, refuse_same_folder
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.formats import all_finite, get_format
from sparse_rt.formats.int8 import PLAIN
from sparse_rt.optional import require
from sparse_rt.progress import Progress

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(options: MergeOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``options.model`` with ``options.adapter`` folded into its values, under the same metadata.

    An adapter that moves the mask (SEFT) brings metadata of its own, which keep as many of every weight.

    The merged values are stored plain, those of an int8 base too: `export --to int8` quantizes them again.

    One weight in memory, except for the comparison of logits, which loads base and merged model one
    after the other. Raises ``UserError`` / ``FormatError`` for an adapter that is damaged or belongs to another model,
    ``CheckFailed`` when the result is not what base + adapter computes; the output folder appears only after the proof.
    """
    progress = progress or Progress()
    start = time.perf_counter()
    output = check_output(options.output_dir, options.overwrite)
    if options.dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype {options.dtype!r} is unknown; allowed are auto, {', '.join(DTYPES)}")
    require("peft", extra="train")
    from sparse_rt.training.saved import SavedAdapter

    checkpoint = Checkpoint.open(options.model)
    checkpoint.quantization.refuse_wrapper("no adapter can be merged into")
    adapter = SavedAdapter.open(options.adapter)
    for folder in (checkpoint.folder, adapter.folder):
        refuse_same_folder(folder, output)
    adapter.check(checkpoint)
    notes = _check_base(options, checkpoint, adapter)
    if checkpoint.quantization.values != PLAIN:
        notes.append(
            f"the base has {checkpoint.quantization.values} values, the merged model has plain ones; `sparse-rt export "
            f"--to {checkpoint.quantization.values}` quantizes them again"
        )
    for note in notes:
        progress.note(note)
    with output_directory(output, options.overwrite) as partial:
        result = _write(options, checkpoint, adapter, partial, progress)
        if options.verify:
            result |= _prove(checkpoint, adapter, partial, progress, notes)
        else:
            notes.append("the merged model was not compared with base + adapter (--no-verify)")
    return {
        "output_dir": str(output),
        "model": options.model,
        "adapter": options.adapter,
        "adapter_type": adapter.adapter.name,
        **result,
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _check_base(options: MergeOptions, checkpoint: Checkpoint, adapter) -> list[str]:
    """Whether the adapter was trained on these very weights; notes for what could not be known."""
    from sparse_rt.training.digest import base_digest

    trained_on = adapter.config.base_digest
    if trained_on is None:
        return ["the adapter does not say which weights it was trained on; only names and shapes were compared"]
    if trained_on == base_digest(checkpoint):
        return []
    message = (
        f"the adapter was trained on other weights than those of {options.model} (it names "
        f"{adapter.config.base_model_name_or_path})"
    )
    if options.verify:
        raise UserError(f"{message}; give that model, or --no-verify to merge all the same")
    return [message]


def _write(options: MergeOptions, checkpoint: Checkpoint, adapter, partial: Path, progress: Progress) -> dict[str, Any]:
    """Write the merged model into ``partial``; returns figures about it."""
    from sparse_rt.training.record import write_merged_card

    dtype = DTYPES.get(options.dtype)
    config = dict(checkpoint.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = options.dtype
    writer = CheckpointWriter(partial, config, checkpoint.quantization.plain(), parse_size(options.max_shard_size))
    changed = total = moved = added = 0
    for name, entry in progress.track(checkpoint.weights.items(), "merging", len(checkpoint.weights)):
        values, metadata, different, elsewhere = _merged(checkpoint, adapter, name, dtype)
        writer.add_weight(name, entry.pattern, entry.m, entry.n, values, metadata)
        changed, total = changed + different, total + values.numel()
        moved, added = moved + elsewhere, added + abs(values.numel() - entry.nnz)
    for name in checkpoint.dense_tensors():
        writer.add(name, _merged_dense(checkpoint, adapter, name, dtype))
    writer.flush()
    about = _about(options, checkpoint, adapter)
    copy_small_files(checkpoint.folder, partial)
    write_merged_card(partial, options.output_dir.name, checkpoint, about, adapter, moved)
    writer.finish(about)
    return {
        "merged_weights": sum(map(adapter.changes, checkpoint.weights)),
        "weights": len(checkpoint.weights),
        "changed_values_percent": round(100 * changed / max(total, 1), 3),
        "bytes": writer.total_bytes,
        "mask": "identical" if not moved else "count differs" if added else "count identical",
        "moved_positions": moved,
    }


def _merged(checkpoint: Checkpoint, adapter, name: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, int, int]:
    """(merged values, metadata, how many values differ from the base, how many positions it does not keep).

    ``CheckFailed`` for NaN or Inf.
    """
    from sparse_rt.adapters.effective import merged_values
    from sparse_rt.training.saved import compressed_weight

    base = weight = compressed_weight(checkpoint, name)
    target = dtype or weight.values.dtype
    updates = []
    if adapter.changes(name):
        weight, update = adapter.apply_to(name, weight)
        updates = [update]
    plain = weight.values.to(target)
    values = merged_values(weight, updates, target) if updates else plain
    _refuse_broken(name, values)
    return values, weight.metadata, int((values != plain).sum()), _moved(base, weight)


def _moved(base, weight) -> int:
    """How many positions ``weight`` keeps and ``base`` does not."""
    if base is weight or torch.equal(base.metadata, weight.metadata):
        return 0
    fmt = get_format(weight.pattern)
    before, after = (fmt.unpack_mask(one.metadata, one.m, one.n) for one in (base, weight))
    return int((after & ~before).sum())


def _merged_dense(checkpoint: Checkpoint, adapter, name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor that is not compressed, as the adapter leaves it (a bias, the weight of a norm, a module of its own)."""
    stored = checkpoint.load(name)
    tensor = adapter.dense(name, stored)
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype or stored.dtype)
    if tensor is not stored:
        _refuse_broken(name, rounded)
    return rounded


def _refuse_broken(name: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise CheckFailed(
            f"merging gives NaN or Inf in {name} as {str(tensor.dtype).removeprefix('torch.')}; nothing was written, "
            "try --dtype float32"
        )


def _about(options: MergeOptions, checkpoint: Checkpoint, adapter) -> dict[str, Any]:
    """What the manifest says about the origin of the merged model."""
    path = checkpoint.folder / MANIFEST_NAME
    parent = read_json(path) if path.is_file() else {}
    source = {
        "kind": "merge",
        "model": options.model,
        "revision": None,
        "manifest_sha256": file_digest(path) if path.is_file() else None,
        "adapter": options.adapter,
        "adapter_type": adapter.adapter.name,
        "adapter_sha256": adapter.digest(),
    }
    kept = {key: parent[key] for key in ("coverage_percent", "skipped") if key in parent}
    parent = {key: parent[key] for key in ("source", "options", "parent") if key in parent}
    return {"source": source, "options": {"dtype": options.dtype}, **({"parent": parent} if parent else {}), **kept}


def _prove(checkpoint: Checkpoint, adapter, partial: Path, progress: Progress, notes: list[str]) -> dict[str, Any]:
    from sparse_rt.training import proof

    progress.stage("comparing masks and logits with base + adapter")
    written = Checkpoint.open(partial)
    proof.check_masks(checkpoint, written, adapter)
    dtype = next(iter(written.weights.values())).dtype
    found = proof.compare_logits(checkpoint.folder, adapter.folder, partial, dtype)
    proof.refuse_different(found)
    if found["logits_error"] > found["adapter_effect"] / 2:
        notes.append(
            f"most of the adapter's effect is lost to rounding in {str(dtype).removeprefix('torch.')}; "
            "merge with --dtype float32 to keep it"
        )
        progress.note(notes[-1])
    return {key: round(value, 8) for key, value in found.items()}
