"""FSDP2: what a run whose weights are split over processes needs, and what it cannot do.

``fully_shard`` cuts every parameter along its first dimension whatever its shape and dtype, so values and metadata are
split bit for bit and put together for the forward and backward pass of their layer.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparse_rt.adapters.base import SparseAdapterModel
from sparse_rt.errors import UserError


def prepare(trainer, adapter: SparseAdapterModel) -> None:
    """Make accelerate's plug-in fit compressed weights; ``UserError`` for FSDP1 and for adapters that cannot be split.

    Does nothing in a run that is not sharded.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UserError(
                "FSDP was asked for and accelerate does not shard this run (it does so for several processes on "
                "accelerators only); leave FSDP out, or launch more processes"
            )
        return
    if plugin.fsdp_version != 2:
        raise UserError(
            "FSDP1 flattens the parameters of a layer into one tensor of one dtype, and a compressed layer has values, "
            "uint8 metadata and a float32 adapter; use FSDP2: accelerate launch --use_fsdp --fsdp_version 2"
        )
    parts = trainer.parts
    reason = adapter.sharding_refusal
    if reason is None and (parts.optimizer is not None or parts.callbacks):
        reason = "it has an optimizer or callbacks of its own, which see whole tensors"
    if reason is not None:
        raise UserError(f"the adapter {adapter.name} cannot be trained under FSDP2: {reason}; use DDP")
    # Each process reads its own part of a checkpoint: with whole ones accelerate 1.15 waits for ever when it loads.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    # Autocast casts what a product takes (bf16); casting parameters as well would round the float32 adapters.
    plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy()


def save_adapter(trainer, folder: str | Path) -> None:
    """Write the adapter of a sharded model as one process would; only its tensors are gathered, no base weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainer.args.should_save:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    trainer.accelerator.wait_for_everyone()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, gathered when it is sharded: every process must call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def all_finite(parameter: nn.Parameter) -> bool:
    """Whether this process's part of ``parameter`` is finite."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(local).all())
