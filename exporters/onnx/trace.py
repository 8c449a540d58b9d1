"""A skeleton becomes a graph of standard operators and placeholders, through torch.onnx."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.errors import SparseRTError, UserError

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_MODEL = "model"  # attribute of the wrapper; prefix of every name in the traced graph


class _KVCacheModel(nn.Module):
    """``model`` with its cache as plain tensors in and out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list):
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        layers = output.past_key_values.layers
        return output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def trace(model: nn.Module, opset: int) -> Any:
    """The ONNX model (``onnx.ModelProto``) of a skeleton; float32 activations.

    Inputs input_ids [batch, sequence], attention_mask [batch, past + sequence], position_ids [batch, sequence] (where
    the model takes them) and past_key_values.{i}.key/value [batch, kv heads, past, head dim]; outputs logits and
    present.{i}.key/value. Every length is dynamic, an empty past included.
    Raises ``UserError`` for a model without an ordinary key-value cache, ``SparseRTError`` when the export fails.
    """
    shapes = _cache_shapes(model)
    wrapper = _KVCacheModel(model).eval()
    batch, length, past_length = 2, 3, 5
    mask = torch.ones(batch, past_length + length, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:] if wrapper.takes_positions else None
    past = [tuple(torch.zeros(batch, heads, past_length, dim) for heads, dim in layer) for layer in shapes]
    ids = torch.ones(batch, length, dtype=torch.long)
    sequence = {0: "batch_size", 1: "sequence_length"}
    dynamic = {
        "input_ids": sequence,
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": sequence if wrapper.takes_positions else None,
        "past": [({0: "batch_size", 2: "past_sequence_length"},) * 2 for _ in shapes],
    }
    cache_names = [f"{index}.{part}" for index in range(len(shapes)) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(["position_ids"] if wrapper.takes_positions else [])]
    outputs = ["logits", *(f"present.{name}" for name in cache_names)]
    inputs += [f"past_key_values.{name}" for name in cache_names]
    return to_onnx(wrapper, (ids, mask, positions, past), inputs, outputs, dynamic, opset)


def to_onnx(
    wrapper: nn.Module, arguments: tuple, inputs: list[str], outputs: list[str], dynamic: dict[str, Any], opset: int
) -> Any:
    """The graph of ``wrapper``, whose attribute ``model`` is the skeleton, traced with ``arguments``.

    ``dynamic`` names the lengths that may change, by argument. ``SparseRTError`` when the export fails.
    """
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                wrapper,
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic,
                verbose=False,
            )
            proto = program.model_proto
        except Exception as error:
            raise SparseRTError(
                f"torch.onnx could not export {type(wrapper.model).__name__}: {first_line(error)}; --debug shows the "
                "cause"
            ) from error
    return _clean(proto)


def _cache_shapes(model: nn.Module) -> list[list[tuple[int, int]]]:
    """(heads, head dim) of key and value of every layer, read off a one-token run of the weightless model."""
    try:
        with torch.no_grad():
            cache = model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values
        return [[(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)] for layer in cache.layers]
    except (AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be exported to ONNX: it does not run on plain linear layers with one key "
            f"and value tensor a layer ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """What ``error`` says, or the error that it wraps (torch.onnx wraps all), without colours of a terminal."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx reports missing torchvision ops and shared axis names; neither concerns a text model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clean(proto: Any) -> Any:
    """Drop the wrapper's name from initializers, and the notes of tracing (they hold local paths) from everything."""
    renamed = {}
    for initializer in proto.graph.initializer:
        if initializer.name.startswith(f"{_MODEL}."):
            renamed[initializer.name] = initializer.name[len(_MODEL) + 1 :]
            initializer.name = renamed[initializer.name]
    _clean_graph(proto.graph, renamed)
    del proto.metadata_props[:]
    return proto


def _clean_graph(graph: Any, renamed: dict[str, str]) -> None:
    del graph.metadata_props[:]
    for value in (*graph.value_info, *graph.input, *graph.output):
        value.name = renamed.get(value.name, value.name)
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _clean_graph(attribute.g, renamed)
