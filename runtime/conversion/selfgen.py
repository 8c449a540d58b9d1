"""``--dataset self``: the dense model's own samples as calibration data, written once and kept for ``--resume``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.checkpoint.writer import JOURNAL_NAME
from sparse_rt.conversion import notes
from sparse_rt.conversion.plan import Plan
from sparse_rt.conversion.source import Source
from sparse_rt.data.selfgen import sample_windows
from sparse_rt.errors import UserError
from sparse_rt.progress import Progress
from sparse_rt.report import size
from sparse_rt.version import __version__

SELF, TEMPERATURE = "self", 1.0
# Beside the weights: the cache of keys and values of a batch, logits, what loading takes for a moment.
ROOM = 1.15


def check_writes(plan: Plan) -> None:
    """``UserError`` for an encoder."""
    if plan.structure.is_encoder:
        raise UserError(
            f"--dataset self lets the model write text, and a {type(plan.structure.model).__name__} predicts no next "
            "token; give a text with --dataset FILE"
        )


def check_room(source: Source, device: torch.device) -> None:
    """``UserError`` when the dense model does not fit into the memory of ``device``, or cannot be loaded as it is.

    Sampling runs all blocks for every token. From a disk that would be a read of the whole model a token, so there is
    no streaming form of it.
    """
    if source.kind != "dense":
        raise UserError(
            f"--dataset self runs the model as transformers loads it, and {source.model} is stored as {source.kind}; "
            "give a text with --dataset FILE"
        )
    needed, free = int(model_bytes(source) * ROOM), free_bytes(device)
    if needed > free:
        raise UserError(
            f"--dataset self runs the dense model as a whole, which takes {size(needed)}, and {size(free)} are free on "
            f"{device}; give a text with --dataset FILE, for example one that the model wrote on a larger machine"
        )


def model_bytes(source: Source) -> int:
    return sum(tensor.numel * tensor.dtype.itemsize for tensor in source.tensors.values())


def free_bytes(device: torch.device) -> int:
    """Memory that a process can take now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def self_tokens(plan: Plan, length: int, device: torch.device, folder: Path, progress: Progress) -> Tensor:
    """int64 [samples, length] that the model wrote, from ``folder`` where an interrupted conversion kept them."""
    mark = _mark(plan, length, device)
    found = notes.stored(folder, notes.SAMPLES, mark)
    if found is None and (folder / JOURNAL_NAME).is_file():
        raise UserError(
            "cannot resume: the unfinished conversion calibrated on other samples; give the same options, or start "
            "over with --overwrite"
        )
    if found is None:
        progress.stage("loading the dense model to sample calibration text")
        options = plan.options
        model = _dense_model(plan.source).to(device)
        windows = sample_windows(model, length, options.num_samples, temperature(plan), options.seed, progress)
        found = windows.tolist()
        notes.store(folder, notes.SAMPLES, mark, found)
    return torch.tensor(found, dtype=torch.long)


def temperature(plan: Plan) -> float:
    given = plan.options.self_temperature
    return TEMPERATURE if given is None else given


def _dense_model(source: Source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto").eval()


def _mark(plan: Plan, length: int, device: torch.device) -> str:
    """Digest of everything that decides what is sampled."""
    options = plan.options
    data = {
        "samples": [options.num_samples, length, temperature(plan), options.seed],
        "source": [str(plan.source.folder.resolve()), plan.source.digest(), plan.source.file_times()],
        "device": device.type,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
