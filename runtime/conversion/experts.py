"""Experts of a mixture that no calibration token was routed to: what they are pruned by, and how that is said."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sparse_rt.formats import Format
from sparse_rt.formats.wrapper import Wrapper, shapes
from sparse_rt.pruning import Pruner
from sparse_rt.pruning.base import Pruned, unpruned_scores

_EXPERT = re.compile(r"\.experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether weight ``name`` belongs to one expert of several, which its router may never choose."""
    return _EXPERT.search(name) is not None


def prune_unseen(pruner: Pruner, weight: Tensor, fmt: Format, sparsity: float | None) -> Pruned:
    """``weight`` [m, n] with its largest |W| kept, as many in every row or matrix as ``pruner`` keeps.

    That is what Wanda does where all inputs are alike. Where ``pruner`` wraps, the wrapper changes nothing.
    """
    mask = fmt.mask_from_scores(unpruned_scores(weight), sparsity, pruner.scope)
    blocks = pruner.blocks(*weight.shape, fmt)
    if blocks is None:
        return Pruned(weight, mask)
    sizes = shapes(*weight.shape, *blocks)
    return Pruned(weight, mask, Wrapper(*(torch.eye(size[-1], device=weight.device).expand(size) for size in sizes)))


def unseen(facts: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, fact in facts.items() if fact.get("unseen")]


def note(names: list[str], method: str) -> str:
    return (
        f"{len(names)} weights of experts were pruned by magnitude, {names[0]} for one: no calibration token reached "
        f"them, and {method} needs inputs; a larger --num-samples or another --dataset reaches more"
    )
