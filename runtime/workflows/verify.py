"""``sparse-rt verify``: every byte of a model against its manifest, its own metadata and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, file_digest, read_json, resolve_model, tensor_digest
from sparse_rt.config import VerifyOptions
from sparse_rt.conversion.compare import SparseSide, compare, open_side
from sparse_rt.conversion.structure import read_structure
from sparse_rt.errors import CheckFailed, FormatError, UserError
from sparse_rt.formats import check_finite, get_format, int8, wrapper
from sparse_rt.progress import Progress

# A model card is meant to be edited; every other file of the manifest is not.
EDITABLE = {"README.md"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def verify(options: VerifyOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Check a sparse-rt folder; with ``against`` compare its weights with another model as well.

    Raises ``FormatError`` naming the tensor or file for any damage, ``CheckFailed`` (with the result) when a weight
    keeps another number of values than in ``against``.
    """
    progress = progress or Progress()
    checkpoint = Checkpoint.open(resolve_model(options.model))
    manifest_path = checkpoint.folder / MANIFEST_NAME
    manifest = read_json(manifest_path) if manifest_path.is_file() else None
    notes = []
    if manifest is None:
        notes.append(f"no {MANIFEST_NAME}: digests were not checked (a folder written by save_pretrained has none)")
    check_weight_files(checkpoint)
    notes += check_model(checkpoint)
    if manifest is not None:
        check_manifest(checkpoint, manifest)
    check_tensors(checkpoint, manifest, progress)
    if manifest is not None:
        notes += check_files(checkpoint.folder, manifest, progress)
    result = {
        "model": options.model,
        "ok": True,
        "files": len(manifest["files"]) if manifest else len(checkpoint.headers),
        "tensors": len(checkpoint.tensors),
        "weights": len(checkpoint.weights),
        "manifest": manifest is not None,
        "notes": notes,
    }
    if options.against:
        progress.stage(f"comparing with {options.against}")
        found = compare(SparseSide(checkpoint), open_side(options.against), progress)
        failed = found.pop("failed")
        result["against"] = {"model": options.against, **found}
        result["ok"] = not failed
        if failed:
            more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise CheckFailed(f"{failed[0]}{more} keeps another number of weights than in {options.against}", result)
    return result


def check_weight_files(checkpoint: Checkpoint) -> None:
    """``FormatError`` for weight files that belong to nothing: vLLM would load every one of them."""
    known = {header.file.name for header in checkpoint.headers}
    for file in sorted(checkpoint.folder.iterdir()):
        if file.suffix in WEIGHT_SUFFIXES and file.name not in known:
            raise FormatError(f"extra weight file {file.name}: the index does not list it; remove it")


def check_model(checkpoint: Checkpoint) -> list[str]:
    """Names and shapes against the model that config.json describes; returns notes."""
    try:
        structure = read_structure(checkpoint.folder, checkpoint.dense_shapes())
    except UserError as error:
        return [f"tensors were not compared with the model: {error}"]
    shapes = checkpoint.dense_shapes()
    for name, parameter in structure.parameters.items():
        if not structure.has(name):
            raise FormatError(f"tensor {name} is missing: the model of config.json needs it; convert or copy again")
        key = structure.key_of(name)  # None: put together from several
        if key is not None and shapes[key] != tuple(parameter.shape):
            raise FormatError(f"tensor {key} has shape {shapes[key]}, config.json announces {tuple(parameter.shape)}")
    unknown = sum(structure.target(key) not in structure.names.known for key in shapes)
    return [f"{unknown} tensors belong to no parameter of the model"] if unknown else []


def check_manifest(checkpoint: Checkpoint, manifest: dict[str, Any]) -> None:
    """The lists of the manifest against the headers: tensors, weights, files and sizes."""
    for part, kind in (("files", dict), ("tensors", str), ("weights", dict)):
        listed = manifest.get(part)
        if not isinstance(listed, dict) or not all(isinstance(entry, kind) for entry in listed.values()):
            raise FormatError(f"{MANIFEST_NAME} has no list of {part}; it is damaged, copy it again")
    for name in manifest["tensors"].keys() - checkpoint.tensors.keys():
        raise FormatError(f"tensor {name} of the manifest is missing")
    for name in checkpoint.tensors.keys() - manifest["tensors"].keys():
        raise FormatError(f"extra tensor {name} in {checkpoint.tensors[name].file.name}: the manifest does not list it")
    for name, weight in checkpoint.weights.items():
        listed = manifest["weights"].get(name, {})
        found = {"pattern": weight.pattern, "shape": [weight.m, weight.n], "nnz": weight.nnz}
        for key, value in found.items():
            if listed.get(key) != value:
                raise FormatError(f"weight {name} has {key} {value}, the manifest says {listed.get(key)}")


def check_tensors(checkpoint: Checkpoint, manifest: dict[str, Any] | None, progress: Progress) -> None:
    """Digests, then popcount, legality, padding and finiteness of every weight, finiteness of the dense tensors."""
    digests = manifest["tensors"] if manifest else {}

    def load(name: str) -> Tensor:
        tensor = checkpoint.load(name)
        if digests and tensor_digest(tensor) != digests[name]:
            raise FormatError(
                f"tensor {name} in {checkpoint.tensors[name].file.name} is not what was written: its sha256 differs "
                "from the manifest; copy the file again"
            )
        return tensor

    for name, weight in progress.track(checkpoint.weights.items(), "checking weights", total=len(checkpoint.weights)):
        fmt = get_format(weight.pattern)
        values, metadata, *others = (load(f"{name}.{suffix}") for suffix in weight.tensor_names)
        if weight.values == int8.INT8:
            shape = weight.m, weight.n, weight.group_size
            int8.widen(name, fmt, values, *others, metadata, *shape, weight.dtype)
            continue
        fmt.check_data(name, values, metadata, weight.m, weight.n)
        if weight.wrapper is not None:
            wrapper.check_data(name, wrapper.Wrapper(*others))
    for name in checkpoint.dense_tensors():
        tensor = load(name)
        if name.endswith((".weight", ".bias")):
            check_finite(name, tensor)


def check_files(folder: Path, manifest: dict[str, Any], progress: Progress) -> list[str]:
    """Size and sha256 of every file; returns notes about files that may change."""
    notes = []
    files = manifest["files"]
    for name, listed in progress.track(files.items(), "checking files", total=len(files)):
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != listed.get("bytes"):
            problem = f"has {path.stat().st_size} bytes, the manifest says {listed.get('bytes')}"
        elif file_digest(path) != listed.get("sha256"):
            problem = "has another sha256 than in the manifest"
        else:
            continue
        if name not in EDITABLE:
            raise FormatError(f"file {name} {problem}; copy it again")
        notes.append(f"{name} {problem}")
    return notes
