"""The proof of an ONNX export: valid file, the checkpoint's very weights, and torch's logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import external_data_helper, numpy_helper

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.onnx.engine import BASE_NOTE, MODEL_NAME
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.exporters.onnx.rows import JoinedCheckpoint, noted
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.optional import require

# Largest difference of a logit, as a share of the largest logit. Observed: 2e-6 to 5e-6 (sums in another order).
TOLERANCE = 1e-4
_PROMPT, _NEW_TOKENS, _PADDING = 17, 64, 5


def check(source: Path, output: Path) -> dict[str, Any]:
    """Compare the ONNX folder ``output`` with the sparse-rt folder ``source``; returns the figures.

    ``onnx.checker`` with shape inference (base=portable; it knows no other operators), every compressed weight bit for
    bit, then ONNX Runtime as it is and, where it can be had, with our operators: logits against torch float32 on the
    decompressed weights (prefill, single-token decode, left-padded batch) and 64 greedy tokens, fewer where the model
    has no positions for them. ``kernel`` says what ran the latter, whose figures begin with ``native_``.
    Raises ``CheckFailed`` with the numbers of the first comparison that does not hold.
    """
    require("onnxruntime", extra="onnx")
    path = output / MODEL_NAME
    _check_file(path)
    figures: dict[str, Any] = {"weights_equal": check_weights(Checkpoint.open(source), path)}
    reference = load(source, dtype=torch.float32, dequantize=True)
    figures |= compare_runs(reference, OnnxModel(output, kernel="body"))
    model = OnnxModel(output)
    figures["kernel"] = model.kernel
    if figures["kernel"] != "body":
        figures |= {f"native_{name}": figure for name, figure in compare_runs(reference, model).items()}
    return figures


def _check_file(path: Path) -> None:
    """The operators of onnxruntime-genai's graphs are in no schema of onnx: ONNX Runtime alone checks them, at load."""
    notes = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
    if notes.get(BASE_NOTE) == "genai":
        return
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"{MODEL_NAME} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def check_weights(checkpoint: Checkpoint, path: Path) -> int:
    """Decode every compressed weight of the ONNX file with numpy and compare its bits; returns how many."""
    proto = onnx.load(str(path), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    joined = JoinedCheckpoint(checkpoint, noted(proto))
    modules = _module_names(joined, tensors)
    for key, entry in joined.weights.items():
        fmt = get_format(entry.pattern)
        expected = _bits(fmt.decompress(*joined.load_weight(key), entry.m, entry.n))
        parts = {}
        for part in (*fmt.tensor_names, "row_offsets", "weight"):
            tensor = tensors.get(f"{modules[key]}.{part}")
            if tensor is not None:
                parts[part] = _read(tensor, path.parent)
        found = parts["weight"] if "weight" in parts else decode(entry.pattern, entry.m, entry.n, parts)
        found = found.view(expected.dtype)
        if not np.array_equal(found, expected):
            raise CheckFailed(
                f"weight {key}: {int((found != expected).sum())} of {expected.size} weights in the ONNX file "
                "differ from the checkpoint"
            )
    return len(checkpoint.weights)


def decode(pattern: str, m: int, n: int, parts: dict[str, np.ndarray]) -> np.ndarray:
    """[m, n] from the initializers of one weight; independent of the package's own code on purpose."""
    values = parts["weight_values"].reshape(-1)
    dense = np.zeros((m, n), values.dtype)
    if pattern == "2:4":
        meta = parts["weight_meta"]
        nibbles = np.stack([meta & 15, meta >> 4], axis=-1).reshape(m, -1)[:, : n // 4]
        columns = np.stack([nibbles & 3, nibbles >> 2], axis=-1) + 4 * np.arange(n // 4)[:, None]
        np.put_along_axis(dense, columns.reshape(m, n // 2).astype(np.int64), values.reshape(m, n // 2), axis=1)
        return dense
    offsets = parts["row_offsets"]
    kept = np.unpackbits(parts["weight_bitmask"], axis=1, count=n, bitorder="little").astype(bool)
    if not np.array_equal(np.diff(offsets), kept.sum(1)) or offsets[0] != 0:
        raise CheckFailed("row_offsets contradict the bitmask")
    dense[kept] = values[: offsets[-1]]
    return dense


def compare_runs(reference: torch.nn.Module, model: OnnxModel) -> dict[str, Any]:
    """Logits and greedy tokens of ``model`` against the float32 torch ``reference``; the figures."""
    vocabulary = reference.config.get_text_config().vocab_size
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, (3, _PROMPT))
    mask = np.ones_like(ids)
    mask[1, :_PADDING], mask[2, : _PROMPT - 1] = 0, 0
    expected = _torch_logits(reference, ids, mask)
    figures: dict[str, Any] = {"tolerance": TOLERANCE, "logit_scale": float(np.abs(expected[mask == 1]).max())}
    whole = expected[:1]
    _compare(figures, "prefill", model.logits(ids[:1]), whole)
    _compare(figures, "decode", _decode_logits(model, ids[:1]), whole)
    _compare(figures, "padded_batch", model.logits(ids, mask)[mask == 1], expected[mask == 1])
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    count = min(_NEW_TOKENS, positions - _PROMPT) if positions else _NEW_TOKENS
    tokens = model.generate(ids[0], count)
    sequence = np.concatenate([ids[:1], tokens], axis=1)
    teacher = _torch_logits(reference, sequence, np.ones_like(sequence))[0, _PROMPT - 1 : -1]
    # Two logits closer than the tolerance may swap places without either engine being wrong.
    short = teacher.max(-1) - np.take_along_axis(teacher, tokens[0][:, None], axis=-1)[:, 0]
    figures["greedy_tokens"] = count
    figures["greedy_equal"] = int((teacher.argmax(-1) == tokens[0]).sum())
    if short.max() > TOLERANCE * max(1.0, figures["logit_scale"]):
        raise CheckFailed(
            f"greedy tokens differ: {figures['greedy_equal']} of {count} equal those of torch, the first other "
            f"one is token {int((short > 0).argmax())}"
        )
    return figures


def _decode_logits(model: OnnxModel, ids: np.ndarray) -> np.ndarray:
    """Logits when every token is fed on its own, starting from an empty past."""
    past, steps = None, []
    for position in range(ids.shape[1]):
        logits, past = model.step(ids[:, position : position + 1], np.ones((1, position + 1)), past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def _compare(figures: dict[str, Any], name: str, found: np.ndarray, expected: np.ndarray) -> None:
    difference = float(np.abs(found - expected).max())
    relative = difference / max(1.0, figures["logit_scale"])
    figures[f"{name}_max_difference"] = difference
    if not relative <= TOLERANCE:  # NaN fails too
        raise CheckFailed(
            f"{name} logits of ONNX Runtime differ from torch by {difference:.3g} (largest logit "
            f"{figures['logit_scale']:.3g}, allowed {TOLERANCE:g} of it)"
        )


@torch.no_grad()
def _torch_logits(reference: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors = {name: torch.as_tensor(value, dtype=torch.long) for name, value in arguments.items()}
    return reference(**tensors).logits.float().numpy()


def _module_names(checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, str]:
    """Checkpoint name -> module name in the ONNX file (they may differ by the base model's prefix)."""
    owners = {name.rpartition(".")[0] for name in tensors}
    names = {}
    for key in checkpoint.weights:
        found = [o for o in owners if o == key or o.endswith(f".{key}") or key.endswith(f".{o}")]
        if len(found) != 1:
            raise CheckFailed(f"weight {key} of the checkpoint is not in the ONNX file")
        names[key] = found[0]
    return names


def _read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)  # the data goes with the copy, not with the model
    if external_data_helper.uses_external_data(loaded):
        external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    return numpy_helper.to_array(loaded)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The raw bits of a float tensor as integers, so that -0.0 differs from 0.0."""
    integer = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    return tensor.contiguous().view(integer).numpy()
