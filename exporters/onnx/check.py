"""The proof of an ONNX export: valid file, the checkpoint's very weights, and torch's logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.int8 import LIMIT as INT8_LIMIT
from sparse_rt.exporters.onnx.encoder import EncoderModel
from sparse_rt.exporters.onnx.engine import BASE_NOTE, MODEL_NAME
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.exporters.onnx.skeleton import Names
from sparse_rt.exporters.onnx.stored import StoredWeights
from sparse_rt.families import predicts_next_token
from sparse_rt.hf.load import load
from sparse_rt.optional import require

# Largest difference of a logit, as a share of the largest logit. Observed: 2e-6 to 5e-6 (sums in another order).
TOLERANCE = 1e-4
# Of our operators where they round activations to int8, 1/254 of the largest one of 256 at most in every layer.
ROUNDED_TOLERANCE = 0.1
_PROMPT, _NEW_TOKENS, _PADDING = 17, 64, 5
# Tokens of an encoder's longest text: more than the windows and the steps of relative positions that are usual.
_LONG = 200


def check(source: Path, output: Path) -> dict[str, Any]:
    """Compare the ONNX folder ``output`` with the sparse-rt folder ``source``; returns the figures.

    ``onnx.checker`` with shape inference (base=portable; it knows no other operators), every compressed weight bit for
    bit, then ONNX Runtime as it is and, where it can be had, with our operators: logits against torch float32 on the
    decompressed weights (prefill, single-token decode, left-padded batch) and 64 greedy tokens, fewer where the model
    has no positions for them. ``kernel`` says what ran the latter, whose figures begin with ``native_``. Where the file
    has int8 values, torch gets the weights that these stand for, and ``int8_values_change_logits_by`` says what
    rounding them on the way cost (relative, in the Frobenius norm).
    Raises ``CheckFailed`` with the numbers of the first comparison that does not hold.
    """
    require("onnxruntime", extra="onnx")
    path = output / MODEL_NAME
    _check_file(path)
    reference = load(source, dtype=torch.float32, dequantize=True)
    checkpoint = Checkpoint.open(source)
    stored = StoredWeights(checkpoint, path, Names.of(reference, checkpoint))
    figures: dict[str, Any] = {"weights_equal": stored.check()}
    if stored.quantized:
        figures |= _round_reference(reference, stored)
    opened = OnnxModel if predicts_next_token(reference.config) else EncoderModel
    figures |= compare_runs(reference, _open(opened, output, "body"))
    model = _open(opened, output, "auto")
    figures["kernel"] = model.kernel
    if figures["kernel"] != "body":
        tolerance = ROUNDED_TOLERANCE if stored.rounds_activations else TOLERANCE
        native = compare_runs(reference, model, tolerance)
        figures |= {f"native_{name}": figure for name, figure in native.items()}
    return figures


def _open(kind: type, output: Path, kernel: str) -> OnnxModel | EncoderModel:
    try:
        return kind(output, kernel=kernel)
    except Exception as error:  # those of ONNX Runtime have no class of their own above them
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise CheckFailed(f"ONNX Runtime does not open {MODEL_NAME}: {str(error).splitlines()[0]}") from error


def _round_reference(reference: torch.nn.Module, stored: StoredWeights) -> dict[str, float]:
    """Give ``reference`` the weights that int8 values of the file stand for; what that costs, if they are new."""
    before = _first_output(reference)
    stored.put_into(reference)
    if stored.source_is_int8:
        return {}
    change = _first_output(reference) - before
    relative = float(np.linalg.norm(change) / np.linalg.norm(before))
    if not relative <= INT8_LIMIT:
        raise CheckFailed(
            f"int8 values change the logits by {relative:.3g} of their norm (allowed {INT8_LIMIT:g}); give a "
            "group_size, or keep the values"
        )
    return {"int8_values_change_logits_by": relative}


def _check_file(path: Path) -> None:
    """The operators of onnxruntime-genai's graphs are in no schema of onnx: ONNX Runtime alone checks them, at load."""
    notes = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
    if notes.get(BASE_NOTE) == "genai":
        return
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"{MODEL_NAME} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def _prompt(reference: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [3, S] and their mask: a whole sequence, one padded on the left, one of a single token."""
    vocabulary = reference.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (3, _PROMPT))
    mask = np.ones_like(ids)
    mask[1, :_PADDING], mask[2, : _PROMPT - 1] = 0, 0
    return ids, mask


def compare_runs(
    reference: torch.nn.Module, model: OnnxModel | EncoderModel, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Logits and greedy tokens of ``model``, or all outputs of an encoder, against the float32 torch ``reference``."""
    if isinstance(model, EncoderModel):
        return _compare_outputs(reference, model, tolerance)
    ids, mask = _prompt(reference)
    expected = _torch_logits(reference, ids, mask)
    figures: dict[str, Any] = {"tolerance": tolerance, "logit_scale": float(np.abs(expected[mask == 1]).max())}
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
    if short.max() > tolerance * max(1.0, figures["logit_scale"]):
        raise CheckFailed(
            f"greedy tokens differ: {figures['greedy_equal']} of {count} equal those of torch, the first other "
            f"one is token {int((short > 0).argmax())}"
        )
    return figures


def _compare_outputs(reference: torch.nn.Module, model: EncoderModel, tolerance: float) -> dict[str, Any]:
    """Every output for one text, for three padded on the right (where no padding is), and for a long one."""
    ids, mask = _prompt(reference)
    positions = getattr(reference.config, "max_position_embeddings", None) or _LONG
    long = np.resize(ids, (1, max(1, min(_LONG, positions - _PADDING))))  # RoBERTa's first two positions are no token's
    right = mask[:, ::-1].copy()
    runs = {"whole": (ids[:1], mask[:1]), "padded_batch": (ids, right), "long": (long, np.ones_like(long))}
    figures: dict[str, Any] = {"tolerance": tolerance, "output_scale": 0.0}
    for run, (texts, kept) in runs.items():
        expected, found = _torch_outputs(reference, texts, kept), model.outputs(texts, kept)
        if found.keys() != expected.keys():
            raise CheckFailed(f"ONNX Runtime returns {', '.join(found)}, torch {', '.join(expected)}; export again")
        differences = []
        for name, value in expected.items():
            scale, rows = float(np.abs(value).max()), kept == 1 if name in model.per_token else slice(None)
            what = f"{run.replace('_', ' ')} {name}"
            differences.append(_difference(what, found[name][rows], value[rows], scale, tolerance))
            figures["output_scale"] = max(figures["output_scale"], scale)
        figures[f"{run}_max_difference"] = max(differences)
    return figures


def _decode_logits(model: OnnxModel, ids: np.ndarray) -> np.ndarray:
    """Logits when every token is fed on its own, starting from an empty past."""
    past, steps = None, []
    for position in range(ids.shape[1]):
        logits, past = model.step(ids[:, position : position + 1], np.ones((1, position + 1)), past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def _compare(figures: dict[str, Any], name: str, found: np.ndarray, expected: np.ndarray) -> None:
    difference = _difference(f"{name} logits", found, expected, figures["logit_scale"], figures["tolerance"])
    figures[f"{name}_max_difference"] = difference


def _difference(what: str, found: np.ndarray, expected: np.ndarray, scale: float, tolerance: float) -> float:
    """The largest difference; ``CheckFailed`` for more than ``tolerance`` of ``scale``, the largest number."""
    difference = float(np.abs(found - expected).max())
    if not difference / max(1.0, scale) <= tolerance:  # NaN fails too
        raise CheckFailed(
            f"{what} of ONNX Runtime differ from torch by {difference:.3g} (largest {scale:.3g}, allowed {tolerance:g} "
            "of it)"
        )
    return difference


def _first_output(reference: torch.nn.Module) -> np.ndarray:
    ids, mask = _prompt(reference)
    if predicts_next_token(reference.config):
        return _torch_logits(reference, ids, mask)
    return next(iter(_torch_outputs(reference, ids, mask).values()))


@torch.no_grad()
def _torch_outputs(reference: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What ``reference`` returns, but for caches."""
    found = reference(input_ids=torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), return_dict=True)
    return {name: value.float().numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def _torch_logits(reference: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors = {name: torch.as_tensor(value, dtype=torch.long) for name, value in arguments.items()}
    return reference(**tensors, return_dict=True).logits.float().numpy()
