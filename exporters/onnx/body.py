"""Which body the functions of an export get: what a runtime without our operators would pay decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import parse_size
from sparse_rt.errors import UserError
from sparse_rt.report import size

# ONNX Runtime 1.32 keeps every intermediate of constant folding (int32 offset and position, float32 values picked,
# spread, reshaped and transposed) until the pass ends. Measured: 31 bytes a weight, summed over the whole model (tests/
# exporters/test_onnx_memory.py); scales of int8 values add two more float32 matrices, and a layer that is not
# compressed has two: widened and transposed.
FOLD_BYTES_PER_WEIGHT, FOLD_BYTES_OF_SCALES, FOLD_BYTES_OF_DENSE = 32, 8, 8
# It does not fold a node whose output exceeds 1 GiB: 4-byte intermediates of 2^28 weights.
MAX_FOLDED_WEIGHTS = 1 << 28
MAX_VALUES = 1 << 31


@dataclass(frozen=True)
class BodyChoice:
    """``name``: folding, streaming, or None for the dense form; ``reason`` is a sentence for users.

    ``fold_bytes``: what folding of all linear layers would take while a session opens, without our operators.
    """

    name: str | None
    reason: str
    fold_bytes: int


def choose_body(checkpoint: Checkpoint, options: Any, dense_weights: int = 0) -> BodyChoice:
    """The body for ``checkpoint`` with ``OnnxOptions``; ``dense_weights``: those of linear layers not compressed.

    Raises ``UserError`` for a weight with 2^31 values or more, and for "folding" with one of 2^28 weights or more.
    """
    entries = checkpoint.weights
    if options.form == "dense":
        return BodyChoice(None, "form=dense has ordinary MatMuls and no functions", 0)
    for name, entry in entries.items():
        if entry.nnz >= MAX_VALUES:
            raise UserError(
                f"{name} keeps {entry.nnz} values, the ONNX operator allows {MAX_VALUES - 1}; use form=dense"
            )
    largest = max(entries, key=lambda name: entries[name].m * entries[name].n)
    most = entries[largest].m * entries[largest].n
    if options.body == "folding" and most >= MAX_FOLDED_WEIGHTS:
        raise UserError(
            f"{largest} has {most} weights, ONNX Runtime folds at most {MAX_FOLDED_WEIGHTS - 1} in one node; "
            "use body=streaming or form=dense"
        )
    quantized = options.values == "int8" or any(entry.values == "int8" for entry in entries.values())
    each = FOLD_BYTES_PER_WEIGHT + (FOLD_BYTES_OF_SCALES if quantized else 0)
    total = sum(entry.m * entry.n for entry in entries.values())
    return _choice(options, largest, most, total * each + dense_weights * FOLD_BYTES_OF_DENSE)


def _choice(options: Any, largest: str, most: int, fold_bytes: int) -> BodyChoice:
    budget = parse_size(options.fold_budget)
    would = f"without our operators folding takes about {size(fold_bytes)} while a session opens"
    if options.body != "auto":
        return BodyChoice(options.body, f"body={options.body} was asked for; {would}", fold_bytes)
    if most >= MAX_FOLDED_WEIGHTS:
        return BodyChoice("streaming", f"ONNX Runtime cannot fold {largest} of {most} weights in one node", fold_bytes)
    if fold_bytes > budget:
        reason = f"{would}, more than fold_budget={options.fold_budget}"
        return BodyChoice("streaming", reason, fold_bytes)
    return BodyChoice("folding", f"{would}, within fold_budget={options.fold_budget}", fold_bytes)


def outlook(choice: BodyChoice) -> str:
    """What the body means for a runtime without our operators: one sentence."""
    if choice.name == "folding":
        return f"folding: {choice.reason}; afterwards speed and memory are those of a dense float32 model"
    if choice.name == "streaming":
        return (
            f"streaming: {choice.reason}; compressed weights stay so and are decompressed in every call, which is "
            "slow: use our operators, or form=dense"
        )
    return choice.reason
