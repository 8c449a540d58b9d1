"""``sparse-rt export --to compressed-tensors``: the sparse layouts that compressed-tensors had up to 0.14.

Of a weight NAME (m, n), ``sparse-bitmask``: ``NAME.compressed`` [nnz] values in row-major order, ``NAME.bitmask``
[m, ceil(n/8)] uint8 (bit j of byte b is column 8b+j), ``NAME.row_offsets`` [m] int64 (first value of each row),
``NAME.shape`` [2] int64. ``sparse-24-bitmask`` is for weights that are all 2:4: ``NAME.compressed`` [m, n/2], the same
bitmask, ``NAME.shape`` [2, 1] int64, no offsets.
Names and dtypes were read off release 0.14.0 (compressors/sparse_compressors/); 0.15.0 removed them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint, CheckpointWriter, SourceCheckpoint, read_json, write_json
from sparse_rt.config import Options, parse_size
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.base import Exporter, register_exporter
from sparse_rt.exporters.folder import copy_side_files
from sparse_rt.formats import get_format
from sparse_rt.formats.packing import pack_bits, row_counts

LAYOUT_VERSION = "0.14.0"
_PARTS = ("compressed", "bitmask", "row_offsets", "shape")
BITMASK, TWO_FOUR = "sparse-bitmask", "sparse-24-bitmask"


class CompressedTensorsOptions(Options):
    layout: Literal["sparse-bitmask", "sparse-24-bitmask"] = Field(
        BITMASK, description="sparse-bitmask for every pattern, sparse-24-bitmask when all weights are 2:4"
    )
    max_shard_size: str | int = Field("5GB", description="largest weight file")


@register_exporter
class CompressedTensorsExporter(Exporter):
    name = "compressed-tensors"

    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        """``CompressedTensorsOptions``; one tensor in memory at a time, a shard at most until it is written."""
        chosen = CompressedTensorsOptions.build(**options)
        checkpoint = Checkpoint.open(source)
        checkpoint.quantization.refuse_wrapper("compressed-tensors has no place for")
        encode = sparse_bitmask
        if chosen.layout == TWO_FOUR:
            _refuse_other_patterns(checkpoint)
            encode = sparse_24_bitmask
        writer = CheckpointWriter(output, checkpoint.config, None, parse_size(chosen.max_shard_size))
        for name, entry in checkpoint.weights.items():
            for part, tensor in encode(entry.pattern, *checkpoint.load_weight(name), entry.m, entry.n).items():
                writer.add(f"{name}.{part}", tensor)
        for name in checkpoint.dense_tensors():
            writer.add(name, checkpoint.load(name))
        copy_side_files(source, output)
        writer.finish()
        config = read_json(output / "config.json")
        config["quantization_config"] = _quantization_config(checkpoint, chosen.layout)
        write_json(output / "config.json", config)
        (output / "README.md").write_text(
            _README.format(name=source.name, layout=chosen.layout, version=LAYOUT_VERSION)
        )
        return {
            "layout": chosen.layout,
            "weights": len(checkpoint.weights),
            "weight_bytes": writer.total_bytes,
        }

    def check(self, source: Path, output: Path) -> dict[str, Any]:
        """Decode every weight with numpy alone and compare its bits with the checkpoint."""
        checkpoint, written = Checkpoint.open(source), SourceCheckpoint.open(output)
        for name, entry in checkpoint.weights.items():
            fmt = get_format(entry.pattern)
            expected = fmt.decompress(*checkpoint.load_weight(name), entry.m, entry.n)
            stored = [part for part in _PARTS if part != "row_offsets" or f"{name}.row_offsets" in written.tensors]
            parts = {part: written.load(f"{name}.{part}") for part in stored}
            integer = torch.int32 if expected.dtype.itemsize == 4 else torch.int16
            found = _decode(name, {part: _plain(tensor, integer) for part, tensor in parts.items()})
            wrong = int((found != expected.view(integer).numpy()).sum())
            if wrong:
                raise CheckFailed(f"weight {name}: {wrong} of {expected.numel()} weights differ from the checkpoint")
        return {"weights_equal": len(checkpoint.weights)}


def _refuse_other_patterns(checkpoint: Checkpoint) -> None:
    other = next(((name, entry) for name, entry in checkpoint.weights.items() if entry.pattern != "2:4"), None)
    if other:
        raise UserError(
            f"layout {TWO_FOUR} takes weights that are 2:4, and {other[0]} is {other[1].pattern}; leave the option out "
            f"for {BITMASK}, which takes every pattern"
        )


def sparse_bitmask(pattern: str, values: Tensor, metadata: Tensor, m: int, n: int) -> dict[str, Tensor]:
    """The four tensors of one weight; positions whose stored value is 0 stay positions."""
    bitmask = pack_bits(get_format(pattern).unpack_mask(metadata, m, n)) if pattern == "2:4" else metadata
    counts = row_counts(bitmask)
    return {
        "compressed": values.flatten(),
        "bitmask": bitmask,
        "row_offsets": counts.cumsum(0) - counts,
        "shape": torch.tensor([m, n]),
    }


def sparse_24_bitmask(pattern: str, values: Tensor, metadata: Tensor, m: int, n: int) -> dict[str, Tensor]:
    """The three tensors of one 2:4 weight; the values stay [m, n/2]."""
    return {
        "compressed": values,
        "bitmask": pack_bits(get_format(pattern).unpack_mask(metadata, m, n)),
        "shape": torch.tensor([[m], [n]]),
    }


def _quantization_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    weights = checkpoint.weights.values()
    total = sum(entry.m * entry.n for entry in weights)
    patterns = {entry.pattern for entry in weights}
    # Every dense matrix by name; naming an embedding does no harm, and a tied head has no tensor of its own.
    dense = [name for name in checkpoint.dense_tensors() if name.endswith(".weight")]
    ignore = {name.removesuffix(".weight") for name in dense if len(checkpoint.tensors[name].shape) == 2}
    if "lm_head" not in checkpoint.weights:
        ignore.add("lm_head")
    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "sparsity_config": {
            "format": layout,
            "global_sparsity": 1 - sum(entry.nnz for entry in weights) / total,
            "ignore": sorted(ignore),
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4" if patterns == {"2:4"} else "unstructured",
            "targets": ["Linear"],
        },
    }


def _plain(tensor: Tensor, integer: torch.dtype) -> np.ndarray:
    return (tensor.view(integer) if tensor.is_floating_point() else tensor).numpy()


def _decode(name: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Raw bits [m, n] of a weight, from the description of the layout and nothing else."""
    m, n = (int(size) for size in parts["shape"].flatten())
    mask = np.unpackbits(parts["bitmask"], axis=1, count=n, bitorder="little").astype(bool)
    starts = parts["row_offsets"] if "row_offsets" in parts else np.arange(m) * (n // 2)
    ends = np.append(starts[1:], parts["compressed"].size)
    if mask.shape != (m, n) or not np.array_equal(mask.sum(1), ends - starts):
        raise CheckFailed(f"weight {name}: bitmask, row_offsets and shape of the written file contradict each other")
    weight = np.zeros((m, n), parts["compressed"].dtype)
    weight[mask] = parts["compressed"].flatten()
    return weight


_README = """# compressed-tensors export

Sparse weights of `{name}` in the `{layout}` layout of compressed-tensors {version}, written by sparse-rt.

Who can read this:

- `sparse-rt convert DIR --method none` reads it back without loss.
- compressed-tensors 0.9 to 0.14 decompresses it, and so do releases of transformers that use it.
- compressed-tensors 0.15 and newer, and the releases of transformers and vLLM built on it, removed sparsity and
  **refuse this folder**. vLLM serves the sparse-rt folder itself through the plugin; for any other tool use
  `sparse-rt export --to dense`.

The layout stores dtypes and bits unchanged; explicit zeros stay positions of the mask.
"""
