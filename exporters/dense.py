"""``sparse-rt export --to dense``: an ordinary Hugging Face folder that every tool reads, zeros included."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from sparse_rt.checkpoint import Checkpoint, CheckpointWriter, SourceCheckpoint
from sparse_rt.config import Options, parse_size
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.base import Exporter, register_exporter
from sparse_rt.exporters.folder import copy_side_files
from sparse_rt.formats import get_format

# Largest difference of a logit in float32, as a share of the largest logit; the two sides only sum in another order.
TOLERANCE = 1e-4
# Where core and wrapper were multiplied and rounded to the dtype of the values.
ROUNDED_TOLERANCE = {torch.float32: TOLERANCE, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_PROMPT = 32

_READER = """
import json, sys
import torch, transformers
folder, ids, target, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
if "sparse_rt" in sys.modules:
    sys.exit("sparse_rt was imported: this was to be a plain transformers process")
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(ids)))[0], target)
"""


class DenseOptions(Options):
    max_shard_size: str | int = Field("5GB", description="largest weight file")


@register_exporter
class DenseExporter(Exporter):
    name = "dense"

    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        """``DenseOptions``; one tensor in memory at a time, a shard at most until it is written."""
        chosen = DenseOptions.build(**options)
        checkpoint = Checkpoint.open(source)
        writer = CheckpointWriter(output, checkpoint.config, None, parse_size(chosen.max_shard_size))
        for name in checkpoint.weights:
            writer.add(f"{name}.weight", checkpoint.load_dense(name))
        for name in checkpoint.dense_tensors():
            writer.add(name, checkpoint.load(name))
        copy_side_files(source, output)
        writer.finish()
        readme = _README if checkpoint.quantization.wrapper is None else _README_WRAPPED
        (output / "README.md").write_text(readme.format(name=source.name))
        return {"weights": len(checkpoint.weights), "weight_bytes": writer.total_bytes}

    def check(self, source: Path, output: Path) -> dict[str, Any]:
        """Every tensor bit for bit, and the logits of plain transformers in a process without sparse_rt."""
        checkpoint, dense = Checkpoint.open(source), SourceCheckpoint.open(output)
        for name, entry in checkpoint.weights.items():
            if entry.wrapper is not None:
                _compare_product(name, checkpoint.load_dense(name), dense.load(f"{name}.weight"))
                continue
            values, metadata = checkpoint.load_weight(name)
            _compare_weight(name, entry, values, metadata, dense.load(f"{name}.weight"))
        from sparse_rt.families import auto_class
        from sparse_rt.hf.load import load

        model = load(source, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, _PROMPT), generator=generator)
        with torch.no_grad():
            expected = model(ids)[0]  # logits, of a body the hidden states
        found = _plain_logits(output, ids, auto_class(model.config).__name__)
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        products = [entry.dtype for entry in checkpoint.weights.values() if entry.wrapper is not None]
        tolerance = max((ROUNDED_TOLERANCE[dtype] for dtype in products), default=TOLERANCE)
        figures = {"weights_equal": len(checkpoint.weights), "logit_scale": scale, "tolerance": tolerance}
        if not difference <= tolerance * max(1.0, scale):
            raise CheckFailed(
                f"logits of the dense model differ from the compressed one by {difference:.3g} "
                f"(largest logit {scale:.3g}, allowed {tolerance:g} of it)"
            )
        return {**figures, "max_difference": difference}


def _compare_weight(name: str, entry: Any, values: torch.Tensor, metadata: torch.Tensor, weight: torch.Tensor) -> None:
    """``CheckFailed`` unless ``weight`` [m, n] holds the values at the mask and +0.0 everywhere else."""
    integer = torch.int32 if values.dtype.itemsize == 4 else torch.int16
    mask = get_format(entry.pattern).unpack_mask(metadata, entry.m, entry.n)
    bits = weight.view(integer)
    wrong = int((bits[mask] != values.flatten().view(integer)).sum()) + int((bits[~mask] != 0).sum())
    if wrong:
        raise CheckFailed(f"weight {name}: {wrong} of {weight.numel()} dense weights differ from the checkpoint")


def _compare_product(name: str, expected: torch.Tensor, weight: torch.Tensor) -> None:
    """``CheckFailed`` unless ``weight`` is the product of core and wrapper."""
    wrong = int((weight != expected).sum())
    if wrong:
        raise CheckFailed(f"weight {name}: {wrong} of {weight.numel()} dense weights differ from core and wrapper")


def _plain_logits(folder: Path, ids: torch.Tensor, auto: str) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "logits.pt"
        command = [sys.executable, "-c", _READER, str(folder), json.dumps(ids.tolist()), str(target), auto]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines()
            raise CheckFailed(
                f"plain transformers could not run the dense model: {lines[-1] if lines else 'no message'}"
            )
        return torch.load(target, weights_only=True)


_README = """# Dense export

An ordinary Hugging Face model made by sparse-rt from `{name}`: the pruned weights are exactly zero, but they are
stored, so this folder is as large as the dense model and no faster. Any tool reads it; `sparse-rt convert --method
none` compresses it again without loss.
"""

_README_WRAPPED = """# Dense export

An ordinary Hugging Face model made by sparse-rt from `{name}`, whose weights are stored as a sparse core between two
block-diagonal matrices. Here each is their product, rounded once: it has no zeros, so this folder is as large as the
dense model, no faster, and `sparse-rt convert --method none` cannot compress it again. Any tool reads it.
"""
