"""Where work runs: "auto" is the first GPU when there is one."""

from __future__ import annotations

import torch

from sparse_rt.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1" -> a device that exists; ``UserError`` otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not known; allowed are auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: this machine has no CUDA device; use cpu or auto")
    return device
