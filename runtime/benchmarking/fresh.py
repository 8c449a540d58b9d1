"""Load time and memory of one model in a process of its own; ``child`` runs it."""

from __future__ import annotations

import gc
from typing import Any

import torch

from sparse_rt.benchmarking.hf_engine import forward_options
from sparse_rt.benchmarking.processes import reset_peak, status_bytes
from sparse_rt.benchmarking.rows import timed
from sparse_rt.benchmarking.training import TrainingStep, adapted, random_tokens
from sparse_rt.benchmarking.weights import tensor_bytes
from sparse_rt.hf.load import load


def load_once(request: dict[str, Any]) -> dict[str, Any]:
    """Load ``request["folder"]`` and run one forward pass of ``tokens`` tokens: seconds and bytes.

    The first forward pass belongs to loading: a dense model is mapped from its file, and only use reads it. With
    ``train_tokens`` an adapter (``adapted``) is trained for two steps afterwards, for their peak alone.
    """
    torch.set_num_threads(request["threads"])
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
    sample = {
        "load": load_seconds,
        "ready": load_seconds + forward_seconds,
        "before": before,
        "peak": status_bytes("VmHWM"),
        "steady": status_bytes("VmRSS"),
        "tensors": tensor_bytes(model),
        "gpu_peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    if request["train_tokens"]:
        reset_peak()
        step = TrainingStep(adapted(model, request["adapter"]), request["train_tokens"])
        for _ in range(2):  # the first step creates the optimizer's state
            step.run()
        sample["train_peak"] = status_bytes("VmHWM")
    return sample


def import_everything(folder: str) -> None:
    """Import what loading ``folder`` imports: half of the time of a small model, and the same on both sides."""
    import transformers.quantizers.auto  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
