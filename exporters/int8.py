"""``sparse-rt export --to int8``: the same sparse-rt folder with its kept values in one byte each, and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sparse_rt import assets
from sparse_rt.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointWriter,
    SparseConfig,
    WeightEntry,
    file_digest,
    read_json,
)
from sparse_rt.checkpoint.config import Producer
from sparse_rt.config import Options, parse_size
from sparse_rt.data import read_texts, token_windows
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.base import Exporter, register_exporter
from sparse_rt.exporters.folder import copy_side_files
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import INT8, PLAIN, check_group_size, dequantize, quantize
from sparse_rt.modelcard import derived_card

# Relative difference (Frobenius norm) of the logits, both models in float32. The shipped model gives 0.003 to 0.004,
# whatever the group size; what comes near this bound is no longer the same model.
LIMIT = 0.1
# How far a value may lie from q * scale, in scales: half a step, and what float32 loses when it divides.
HALF_STEP = 0.5 + 2**-16
WINDOWS, TOKENS = 2, 128


class Int8Options(Options):
    group_size: int | None = Field(128, description="columns that share a scale: 64, 128, 256, or null for whole rows")
    max_shard_size: str | int = Field("5GB", description="largest weight file")

    @field_validator("group_size", mode="before")
    @classmethod
    def _group_size(cls, value):
        check_group_size(value)
        return value


@register_exporter
class Int8Exporter(Exporter):
    name = "int8"

    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        """``Int8Options``; one tensor in memory at a time, a shard at most until it is written."""
        chosen = Int8Options.build(**options)
        checkpoint = Checkpoint.open(source)
        checkpoint.quantization.refuse_wrapper("int8 values cannot stand for")
        if checkpoint.quantization.values != PLAIN:
            raise UserError(
                f"{source} has {checkpoint.quantization.values} values already, and quantizing twice only loses more; "
                "export the model that it was made from"
            )
        update = {"values": INT8, "group_size": chosen.group_size, "producer": Producer()}
        config = checkpoint.quantization.model_copy(update=update)
        writer = CheckpointWriter(output, checkpoint.config, config, parse_size(chosen.max_shard_size))
        for name, entry in checkpoint.weights.items():
            values, metadata = checkpoint.load_weight(name)
            fmt, shape = get_format(entry.pattern), (entry.m, entry.n)
            q, scales = quantize(fmt, values, metadata, *shape, chosen.group_size)
            writer.add_weight(name, entry.pattern, *shape, q, metadata, scales, entry.dtype)
        for name in checkpoint.dense_tensors():
            writer.add(name, checkpoint.load(name))
        writer.flush()
        copy_side_files(source, output)
        (output / "README.md").write_text(_card(source, config))
        writer.finish(_about(source, chosen))
        return {
            "weights": len(checkpoint.weights),
            "values": INT8,
            "group_size": chosen.group_size,
            "weight_bytes": writer.total_bytes,
        }

    def check(self, source: Path, output: Path) -> dict[str, Any]:
        """Every value within half a scale, the same masks and dense tensors; then logits against the source.

        Two windows of the shipped held-out text, both models in float32 (random tokens where the folder has no
        tokenizer; then there is no perplexity). ``CheckFailed`` with the figures where the logits differ by more than
        ``LIMIT``.
        """
        plain, written = Checkpoint.open(source), Checkpoint.open(output)
        error = max(_check_weight(plain, written, name, entry) for name, entry in plain.weights.items())
        for name in plain.dense_tensors():
            if not torch.equal(plain.load(name), written.load(name)):
                raise CheckFailed(f"tensor {name} differs from the source, and it is not quantized")
        figures = {"weights": len(plain.weights), "largest_error_in_scales": error, **compare_logits(source, output)}
        if not figures["logits_error"] <= LIMIT:
            group_size = written.quantization.group_size
            finer = "64" if group_size == 128 else "128"
            advice = f"; try --options group_size={finer}" if group_size != 64 else ""
            raise CheckFailed(
                f"logits of the int8 model differ from the source by {figures['logits_error']:.3g} (relative), allowed "
                f"is {LIMIT}{advice}",
                figures,
            )
        return figures


def _check_weight(plain: Checkpoint, written: Checkpoint, name: str, entry: WeightEntry) -> float:
    """Largest distance of a value from q * scale, in scales; ``CheckFailed`` above half, or for another mask."""
    values, metadata = plain.load_weight(name)
    q, scales, found = written.load_quantized(name)
    if not torch.equal(found, metadata):
        raise CheckFailed(f"weight {name}: the mask differs from the source")
    where = scales, metadata, entry.m, entry.n, written.quantization.group_size
    steps = dequantize(get_format(entry.pattern), torch.ones_like(q), *where, torch.float64)
    difference = (values.double() - q.double() * steps).abs()
    wrong = int((difference > HALF_STEP * steps).sum())
    if wrong:
        raise CheckFailed(f"weight {name}: {wrong} of {q.numel()} values are more than half a scale off")
    return float((difference / steps.clamp_min(1e-300)).max()) if q.numel() else 0.0


def compare_logits(source: Path, output: Path) -> dict[str, Any]:
    """Relative error of the logits, share of equal likeliest tokens and, on text, the perplexity of both models."""
    from sparse_rt.hf.load import load

    tokenizer = _tokenizer(source)
    model = load(source, dtype=torch.float32)
    tokens = _tokens(tokenizer, model.config.get_text_config())
    expected = _logits(model, tokens)
    del model
    found = _logits(load(output, dtype=torch.float32), tokens)
    figures = {
        "logits_error": float((found - expected).norm() / expected.norm()),
        "logits_limit": LIMIT,
        "greedy_agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        "tokens": tokens.numel(),
    }
    if tokenizer is not None:
        figures |= {"perplexity": _perplexity(found, tokens), "source_perplexity": _perplexity(expected, tokens)}
    return figures


def _tokenizer(folder: Path) -> Any | None:
    from sparse_rt.hf.load import load_tokenizer

    try:
        return load_tokenizer(folder)
    except (OSError, ValueError):  # what transformers raises where there is none
        return None


def _tokens(tokenizer: Any | None, config: Any) -> Tensor:
    """int64 [WINDOWS, TOKENS], the same at every call."""
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    if tokenizer is not None:
        return token_windows(read_texts(assets.heldout_text()), tokenizer, length, WINDOWS)
    return torch.randint(config.vocab_size, (WINDOWS, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False)[0].float()


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())


def _about(source: Path, options: Int8Options) -> dict[str, Any]:
    """What the manifest says about the origin of the folder."""
    path = source / MANIFEST_NAME
    parent = read_json(path) if path.is_file() else {}
    kept = {key: parent[key] for key in ("coverage_percent", "skipped") if key in parent}
    parent = {key: parent[key] for key in ("source", "options", "parent") if key in parent}
    origin = {
        "kind": INT8,
        "model": str(source),
        "revision": None,
        "manifest_sha256": file_digest(path) if path.is_file() else None,
    }
    about = {"source": origin, "options": {"group_size": options.group_size}, **kept}
    return {**about, "parent": parent} if parent else about


def _card(source: Path, config: SparseConfig) -> str:
    per = "row of a weight" if config.group_size is None else f"{config.group_size} columns of a row"
    body = _README.format(name=source.name, pattern=config.pattern, per=per)
    return derived_card(source, body, config)


_README = """# {name}, int8

The sparse model `{name}` (pattern {pattern}) with its kept values rounded to int8 and a float32 scale for every {per}.
The masks are those of `{name}`, byte for byte; embeddings, norms and everything else that was not compressed is as it
was.

```python
import sparse_rt  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

transformers and vLLM widen the values when they load the model, to the dtype that it had before: the folder is smaller,
the model in memory is not. Releases of sparse-rt that do not know int8 values refuse the folder.
"""
