"""Models that read a whole text at once and predict no next token: encoders, classifiers, taggers.

They have no key-value cache: token ids and their mask go in, and what the class of transformers returns comes out.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx.engine import Kernel, session, which_kernel
from sparse_rt.exporters.onnx.trace import first_line, to_onnx

_SHAPE = {0: "batch_size", 1: "sequence_length"}


class _Encoder(nn.Module):
    """``model`` with tensors in and the tensors ``outputs`` of its result out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs: list[str] = []
        arguments = inspect.signature(model.forward).parameters
        # RoBERTa takes the types of tokens, too, and has one.
        self.takes_types = "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
        self.has_cache = "use_cache" in arguments
        self.rotates = "position_ids" in arguments and hasattr(model.base_model, "rotary_emb")

    def run(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
        given: dict[str, Any] = {"token_type_ids": token_type_ids} if self.takes_types else {}
        if self.has_cache:
            given["use_cache"] = False
        if self.rotates:
            # Left to itself the model makes one row of angles for all texts; ONNX's RotaryEmbedding wants a row each.
            given["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **given)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None):
        found = self.run(input_ids, attention_mask, token_type_ids)
        return tuple(found[name] for name in self.outputs)


def trace_encoder(model: nn.Module, opset: int) -> Any:
    """The ONNX model (``onnx.ModelProto``) of a skeleton; float32 activations.

    Inputs input_ids, attention_mask and, where there are two types of tokens, token_type_ids, each int64 [batch,
    sequence]; outputs the tensors that the class returns, under its names (logits, start_logits, last_hidden_state),
    but no tuples of tensors such as hidden_states.
    Raises ``UserError`` for a model that does not run on these, ``SparseRTError`` when the export fails.
    """
    wrapper = _Encoder(model).eval()
    batch, length = 2, 7
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    ids = torch.ones(batch, length, dtype=torch.long)
    types = torch.zeros_like(ids) if wrapper.takes_types else None
    _load_read_tables(wrapper, (ids, mask, types))
    try:
        with torch.no_grad():
            found = wrapper.run(ids, mask, types)
        wrapper.outputs = [name for name, value in found.items() if isinstance(value, Tensor)]
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be exported to ONNX: it does not run on token ids [batch, sequence] and "
            f"their mask alone ({first_line(error)})"
        ) from error
    dynamic = {
        "input_ids": _SHAPE,
        "attention_mask": _SHAPE,
        "token_type_ids": _SHAPE if wrapper.takes_types else None,
    }
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if wrapper.takes_types else [])]
    return to_onnx(wrapper, (ids, mask, types), names, wrapper.outputs, dynamic, opset)


def _load_read_tables(wrapper: _Encoder, arguments: tuple) -> None:
    """Give embeddings that the model reads itself and never calls (DeBERTa's relative positions) their tables."""
    tables = {module for module in wrapper.modules() if hasattr(module, "load_table")}
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in tables]
    # Such a model may fail on a table that is not there; any other failure comes again in the run that follows.
    with torch.no_grad(), contextlib.suppress(Exception):
        wrapper.run(*arguments)
    for hook in hooks:
        hook.remove()
    for module in tables - called:
        module.weight = module.load_table()


class EncoderModel:
    """An exported folder in an ``onnxruntime.InferenceSession`` on the CPU; arguments and errors of ``session``."""

    def __init__(self, folder: str | Path, threads: int | None = None, kernel: Kernel = "auto"):
        self.session = session(folder, threads, kernel)
        outputs = self.session.get_outputs()
        self._names = [entry.name for entry in outputs]
        # Results with a row for every token; those of a whole text have a fixed second dimension.
        self.per_token = {entry.name for entry in outputs if len(entry.shape) > 1 and isinstance(entry.shape[1], str)}
        self._inputs = {entry.name for entry in self.session.get_inputs()}

    @property
    def kernel(self) -> str:
        """``which_kernel`` of the session."""
        return which_kernel(self.session)

    def outputs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """float32 results by name for ids [B, S] and their mask [B, S] (0 = padding); all tokens of the first type."""
        ids = np.ascontiguousarray(np.atleast_2d(ids), np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        if mask is not None:
            feed["attention_mask"] = np.ascontiguousarray(mask, np.int64)
        found = self.session.run(self._names, {name: feed[name] for name in feed if name in self._inputs})
        return dict(zip(self._names, found, strict=True))
