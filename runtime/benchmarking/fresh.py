"""Load time and memory of one model in a process of its own; ``child`` runs it."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch

from sparse_rt.benchmarking.hf_engine import forward_options, random_tokens
from sparse_rt.benchmarking.processes import status_bytes
from sparse_rt.benchmarking.rows import timed
from sparse_rt.hf.load import load


def load_once(request: dict[str, Any]) -> dict[str, Any]:
    """Load ``request["folder"]`` and run one forward pass of ``tokens`` tokens: seconds and bytes.

    The first forward pass belongs to loading: a dense model is mapped from its file, and only use reads it.
    """
    device = torch.device(request["device"])
    import_everything(request["folder"])
    torch.zeros(1, device=device)  # starts the accelerator, which is not counted either
    before = status_bytes("VmRSS")
    reset_peak()
    load_seconds, model = timed(lambda: load(request["folder"], dtype=request["dtype"]).to(device), device)
    ids = random_tokens(model, 1, request["tokens"])
    with torch.inference_mode():
        forward_seconds, _ = timed(lambda: model(ids, use_cache=False, **forward_options(model)), device)
    gc.collect()
    parameters = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return {
        "load": load_seconds,
        "ready": load_seconds + forward_seconds,
        "before": before,
        "peak": status_bytes("VmHWM"),
        "steady": status_bytes("VmRSS"),
        "parameters": sum(parameters.values()),
        "gpu_peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def import_everything(folder: str) -> None:
    """Import what loading ``folder`` imports: half of the time of a small model, and the same on both sides."""
    import transformers.quantizers.auto  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then includes the imports, which are the same on both sides
        Path("/proc/self/clear_refs").write_text("5")
