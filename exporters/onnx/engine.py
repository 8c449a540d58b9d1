"""Sessions of ONNX Runtime on an exported folder: with the operators of our library where it can be had."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import library
from sparse_rt.kernels.native.library import ISA_VARIABLE
from sparse_rt.optional import require

logger = logging.getLogger(__name__)

MODEL_NAME = "model.onnx"
# Key of the model's metadata that names the option base of its export.
BASE_NOTE = "sparse_rt.base"
Kernel = Literal["auto", "native", "body"]
# numpy's names of the tensor types that inputs of an exported model may have.
_DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_told: set[str] = set()


def session(folder: str | Path, threads: int | None = None, kernel: Kernel = "auto") -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU for ``model.onnx`` of ``folder``.

    ``threads`` is ONNX Runtime's intra-op pool, None its own choice. ``kernel``: "native" runs compressed layers in our
    library, "body" in the functions of the file, "auto" in the library where it can be had (otherwise a warning, once,
    says why not). Raises ``UserError`` when the folder holds no model, onnxruntime is not installed, or "native" cannot
    be had.
    """
    ort = require("onnxruntime", extra="onnx")
    path = Path(folder) / MODEL_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {MODEL_NAME}; make one with `sparse-rt export MODEL --to onnx`")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if kernel != "body":
        register(options, required=kernel == "native")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def register(options: Any, required: bool = False) -> bool:
    """Add the library to ``onnxruntime.SessionOptions``; False: there is none (``required``: ``UserError``)."""
    reason = library.unavailable_reason()
    if reason is None:
        library.use_isa(os.environ.get(ISA_VARIABLE, ""))
        options.register_custom_ops_library(str(library.path()))
        return True
    if required:
        raise UserError(f"the operators for ONNX Runtime cannot be used: {reason}")
    if reason not in _told:
        _told.add(reason)
        logger.warning(
            "ONNX Runtime decompresses the weights itself (slower, or as large as dense: README.md in the folder says "
            "which), because the operators for it cannot be used: %s",
            reason,
        )
    return False


def which_kernel(session: Any) -> str:
    """What multiplies the compressed layers of ``session``, found out by running it on one token.

    "native (avx512)", or another instruction set: our library; "body": the functions of the file, or no operator of
    ours is in it.
    """
    before = library.calls() if library.unavailable_reason() is None else None
    if before is None:
        return "body"
    session.run(None, {entry.name: _one_token(entry) for entry in session.get_inputs()})
    return f"native ({library.isa()})" if library.calls() > before else "body"


def _one_token(entry: Any) -> np.ndarray:
    """A first token of one sequence for an input of the model: every length is 1, of the past 0."""
    dtype = _DTYPES.get(entry.type)
    if dtype is None:
        raise UserError(f"input {entry.name} has type {entry.type}; which_kernel knows {', '.join(_DTYPES)}")
    past = entry.name.startswith("past_key_values.")
    sizes = [size if isinstance(size, int) else int(not (past and "past" in str(size))) for size in entry.shape]
    return np.ones(sizes, dtype) if entry.name == "attention_mask" else np.zeros(sizes, dtype)
