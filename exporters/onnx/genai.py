"""What onnxruntime-genai wants beside an exported model: ``genai_config.json`` and the library inside the folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from sparse_rt.checkpoint import read_json, write_json
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import library
from sparse_rt.exporters.onnx.builder import CLASSES
from sparse_rt.exporters.onnx.engine import MODEL_NAME
from sparse_rt.families import predicts_next_token
from sparse_rt.kernels.native.build import BuildError

CONFIG_NAME = "genai_config.json"
# Their names are the same in transformers.
KNOWN_TYPES = tuple(CLASSES)


def check_type(config: dict[str, Any]) -> None:
    """``UserError`` for a model that onnxruntime-genai does not know."""
    if config.get("model_type") not in KNOWN_TYPES:
        raise UserError(
            f"onnxruntime-genai does not run models of type {config.get('model_type')!r} from this graph; it runs "
            f"{', '.join(KNOWN_TYPES)}. Leave the option genai out"
        )


def check_generates(model: nn.Module) -> None:
    """``UserError`` for an encoder or a classifier."""
    if not predicts_next_token(model.config):
        raise UserError(
            f"the model is a {type(model).__name__}, which onnxruntime-genai does not run: it generates no text; leave "
            "genai and base out"
        )


def write_genai(folder: Path, proto: Any, base: str, operators: bool) -> None:
    """Make ``folder`` one that ``onnxruntime_genai.Model`` opens; the graph is ``proto`` (``onnx.ModelProto``).

    With ``operators`` of ours in the graph a copy of the library is put there, compiled for this kind of processor and
    system: it is taken only from inside the folder. ``UserError`` where it cannot be compiled.
    """
    options: dict[str, Any] = {"log_id": "sparse-rt", "provider_options": []}
    if operators:
        _copy_library(folder)
        options["custom_ops_library"] = library.FILE_NAME
    config = read_json(folder / "config.json")
    side = folder / "generation_config.json"
    generation = read_json(side) if side.is_file() else {}
    caches = [entry for entry in proto.graph.input if entry.name.endswith(".key")]
    heads, head_size = (caches[0].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    inputs = {entry.name: entry.name for entry in proto.graph.input if not entry.name.startswith("past_key_values.")}
    tokens = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens["pad_token_id"] = _first(tokens["pad_token_id"], tokens["eos_token_id"], 0)
    length = config.get("max_position_embeddings", 2048)
    decoder = {
        "session_options": options,
        "filename": MODEL_NAME,
        "head_size": head_size,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": len(caches),
        "num_key_value_heads": heads,
        "inputs": inputs | _cache_names("past", "past_key_values"),
        "outputs": {"logits": "logits", **_cache_names("present", "present")},
    }
    model = {
        "type": config["model_type"],
        "vocab_size": config["vocab_size"],
        "context_length": length,
        **{name: token for name, token in tokens.items() if token is not None},
        "decoder": decoder,
    }
    # The portable graph grows its cache: one buffer for past and present is what GroupQueryAttention can write to.
    search = {"do_sample": False, "max_length": length, "num_beams": 1, "past_present_share_buffer": base == "genai"}
    write_json(folder / CONFIG_NAME, {"model": model, "search": search})


def _copy_library(folder: Path) -> None:
    try:
        shutil.copyfile(library.path(), folder / library.FILE_NAME)
    except BuildError as error:
        raise UserError(f"the option genai needs the operators as a library: {error}") from error


def _cache_names(word: str, stem: str) -> dict[str, str]:
    return {f"{word}_key_names": f"{stem}.%d.key", f"{word}_value_names": f"{stem}.%d.value"}


def _first(*candidates: Any) -> int:
    """The first token that is named; of several the first."""
    for candidate in candidates:
        if isinstance(candidate, list) and candidate:
            return candidate[0]
        if isinstance(candidate, int):
            return candidate
    return 0
