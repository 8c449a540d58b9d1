"""Memory of one exported model in a process of its own; ``child`` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparse_rt.benchmarking.processes import reset_peak, status_bytes
from sparse_rt.exporters.onnx import library
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.optional import require

# Part of a sample -> what /proc calls it.
PARTS = {"anonymous": "RssAnon", "resident": "VmRSS", "peak": "VmHWM"}


def memory_once(request: dict[str, Any]) -> dict[str, Any]:
    """Open ``request["folder"]`` and run a prompt of ``tokens`` tokens: bytes by which the process has grown.

    ``before`` is what Python and the libraries hold before that, resident.
    """
    require("onnxruntime", extra="onnx")
    library.unavailable_reason()  # finds, or compiles, the library: not part of a session
    before = status_bytes("RssAnon"), status_bytes("VmRSS")
    if None in before:
        return {}
    reset_peak()
    model = OnnxModel(Path(request["folder"]), threads=request["threads"])
    ids = np.random.default_rng(0).integers(0, request["vocabulary"], (1, request["tokens"]))
    model.generate(ids, 1)
    after = {part: status_bytes(name) for part, name in PARTS.items()}
    anonymous, resident = before
    return {
        "before": resident,
        "anonymous": after["anonymous"] - anonymous,
        "resident": after["resident"] - resident,
        "peak": after["peak"] - resident,
    }
