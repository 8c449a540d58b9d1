"""The teacher's outputs on disk: computed once over the training rows, found again by the content of a row.

A folder with teacher.json (what it was made from, and with which options) and shards in safetensors, each the rows one
after another:

    keys      uint8 [rows, 32]         sha256 of a row (``row_key``)
    lengths   int64 [rows]
    ids       int32 [tokens, k]        the likeliest next tokens at every position
    log_p     float16 [tokens, k + 1]  their log-probabilities and that of all others, at the temperature
    hidden    bfloat16 [tokens, blocks, H]   with SquareHead

Rows are read when they are needed; the folder can be far larger than memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_rt.checkpoint import output_directory, read_json, write_json
from sparse_rt.errors import FormatError, UserError
from sparse_rt.progress import Progress
from sparse_rt.training.distillation import losses
from sparse_rt.training.distillation.teacher import LiveTeacher, Outputs
from sparse_rt.training.rows import real_tokens, row_key

FACTS_NAME = "teacher.json"
SHARD_BYTES = 256_000_000
# Tokens of one forward pass of the teacher, padding included.
BATCH_TOKENS = 4096


def rows_of(dataset) -> dict[bytes, int]:
    """Key of every different row -> its number in ``dataset``."""
    names = [name for name in ("input_ids", "position_ids") if name in dataset.column_names]
    rows = dataset.with_format("numpy", columns=names)
    return {row_key(*(row[name] for name in names)): number for number, row in enumerate(rows)}


def facts_of(rows: dict[bytes, int], teacher: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What a cache belongs to; ``teacher`` is the digest of its weights, None when nobody knows it any more."""
    return {"rows": hashlib.sha256(b"".join(sorted(rows))).hexdigest(), "teacher": teacher, **options}


def refuse_stale(folder: Path, wanted: dict[str, Any]) -> None:
    """``UserError`` when the cache in ``folder`` was made from something else, or is none."""
    if not (folder / FACTS_NAME).is_file():
        raise UserError(f"{folder} is no teacher cache ({FACTS_NAME} is missing); give an empty folder")
    found = read_json(folder / FACTS_NAME)
    changed = [key for key, value in wanted.items() if found.get(key) != value and not (key == "teacher" and not value)]
    if changed:
        raise UserError(
            f"the teacher cache {folder} was made with other values of {', '.join(sorted(changed))}; give another "
            "folder, or remove this one and give --teacher to make it again"
        )


def bytes_a_token(options: dict[str, Any], blocks: int, width: int) -> int:
    size = 6 * options["top_k"] + 2 if options["top_k"] else 0
    return size + (2 * blocks * width if options["hidden"] else 0)


def write_cache(
    folder: Path, teacher: LiveTeacher, dataset, rows: dict[bytes, int], facts: dict[str, Any], collate, progress
) -> None:
    """Run ``teacher`` over ``rows`` of ``dataset`` and write ``folder``, whole or not at all.

    Says what it will take before it begins; ``UserError`` when the disk has not that much room.
    """
    config, lengths = teacher.model.config, _lengths(dataset)
    needed = sum(lengths[number] for number in rows.values()) * bytes_a_token(
        facts, getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    )
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > 0.95 * free:
        raise UserError(
            f"the teacher's outputs take {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} GB left; "
            "lower --teacher-top-k, leave SquareHead out, or train with --teacher alone"
        )
    progress.note(f"the teacher's outputs take {needed / 1e9:.2f} GB in {folder}")
    with output_directory(folder, overwrite=True) as partial:
        shards, pending, size = 0, [], 0
        batches = list(_batches(sorted(rows.items(), key=lambda item: (lengths[item[1]], item[1])), lengths))
        for batch in progress.track(batches, "running the teacher", total=len(batches)):
            pending += _outputs(teacher, dataset, batch, facts, collate)
            size = sum(tensor.nbytes for row in pending for tensor in row.values())
            if size >= SHARD_BYTES:
                shards, pending = shards + 1, _save(partial, shards, pending)
        if pending:
            _save(partial, shards + 1, pending)
        write_json(partial / FACTS_NAME, facts)


def _lengths(dataset) -> list[int]:
    return [len(row) for row in dataset.with_format("numpy", columns=["input_ids"])["input_ids"]]


def _batches(rows: list[tuple[bytes, int]], lengths: list[int]) -> Iterator[list[tuple[bytes, int]]]:
    """Rows sorted by length, as many at once as ``BATCH_TOKENS`` allow."""
    batch: list[tuple[bytes, int]] = []
    for key, number in rows:
        if batch and (len(batch) + 1) * lengths[number] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append((key, number))
    if batch:
        yield batch


def _outputs(teacher: LiveTeacher, dataset, batch, facts: dict[str, Any], collate) -> list[dict[str, Tensor]]:
    """The tensors of each row of ``batch``, without padding."""
    inputs = {name: tensor.to(teacher.model.device) for name, tensor in collate([dataset[i] for _, i in batch]).items()}
    found, real = teacher(inputs), real_tokens(inputs)
    tensors: dict[str, Tensor] = {}
    if facts["top_k"]:
        ids, log_p = losses.top(found.logits, facts["top_k"], facts["temperature"])
        # Beyond the range of float16 a probability is as good as this one: e^-60000 is 0 in float32 too.
        tensors = {"ids": ids.to(torch.int32), "log_p": log_p.clamp_min(-60000).to(torch.float16)}
    if facts["hidden"]:
        tensors["hidden"] = torch.stack(found.hidden, dim=2).to(torch.bfloat16)
    rows = []
    for place, (key, _) in enumerate(batch):
        row = {name: tensor[place][real[place]].cpu() for name, tensor in tensors.items()}
        row["keys"] = torch.from_numpy(np.frombuffer(key, dtype=np.uint8).copy())[None]
        row["lengths"] = real[place].sum().cpu().view(1)
        rows.append(row)
    return rows


def _save(folder: Path, number: int, rows: list[dict[str, Tensor]]) -> list:
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    save_file(tensors, folder / f"teacher-{number:05d}.safetensors")
    return []


class CachedTeacher:
    """The outputs in ``folder``, by the content of the rows of a batch."""

    def __init__(self, folder: Path):
        self.facts = read_json(folder / FACTS_NAME)
        self.places: dict[bytes, tuple[int, int, int]] = {}
        self.shards = []
        for number, path in enumerate(sorted(folder.glob("teacher-*.safetensors"))):
            shard = safe_open(path, framework="pt")
            self.shards.append(shard)
            stops = shard.get_tensor("lengths").cumsum(0).tolist()
            for key, start, stop in zip(shard.get_tensor("keys").numpy(), [0, *stops], stops, strict=False):
                self.places[key.tobytes()] = number, start, stop

    def __call__(self, inputs: dict[str, Any]) -> Outputs:
        ids, real = inputs["input_ids"], real_tokens(inputs)
        names = [name for name in ("input_ids", "position_ids") if name in inputs]
        rows = [
            self._place(row_key(*(inputs[name][place][real[place]].cpu().numpy() for name in names)))
            for place in range(len(ids))
        ]

        def padded(name: str) -> Tensor:
            parts = [self.shards[shard].get_slice(name)[start:stop] for shard, start, stop in rows]
            whole = parts[0].new_zeros((*ids.shape, *parts[0].shape[1:]))
            for place, part in enumerate(parts):
                whole[place, : len(part)] = part
            return whole.to(ids.device)

        top = (padded("ids").long(), padded("log_p")) if self.facts["top_k"] else None
        return Outputs(None, top, padded("hidden").unbind(2) if self.facts["hidden"] else None)

    def _place(self, key: bytes) -> tuple[int, int, int]:
        if key not in self.places:
            raise FormatError("a training row is not in the teacher cache; remove the folder and give --teacher again")
        return self.places[key]


def open_cache(
    folder: Path, load_teacher, digest: str | None, dataset, options: dict[str, Any], collate, progress: Progress
) -> CachedTeacher:
    """The cache of ``dataset`` in ``folder``, made when the folder is empty or missing.

    ``load_teacher()`` brings the teacher into memory for that time; None when no teacher was named.
    """
    rows = rows_of(dataset)
    facts = facts_of(rows, digest, options)
    if folder.is_dir() and any(folder.iterdir()):
        refuse_stale(folder, facts)
        progress.note(f"using the teacher's outputs in {folder}")
    elif load_teacher is None:
        raise UserError(f"there is no teacher cache in {folder}; give --teacher to make it")
    else:
        progress.stage("running the teacher")
        write_cache(folder, load_teacher(), dataset, rows, facts, collate, progress)
    return CachedTeacher(folder)
