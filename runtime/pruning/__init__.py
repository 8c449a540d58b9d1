"""Choosing which weights stay, and calibrating that choice on a model's own activations, one block at a time."""

from sparse_rt.pruning.base import (
    Pruned,
    Pruner,
    Repair,
    get_pruner,
    known_pruners,
    known_repairs,
    register_pruner,
    register_repair,
)
from sparse_rt.pruning.calibrate import BlockRunner, find_blocks
from sparse_rt.pruning.reconstruct import Compressed, Schedule, reconstruct
from sparse_rt.pruning.shared import SharedStats
from sparse_rt.pruning.statistics import ActivationStats

__all__ = [
    "ActivationStats",
    "BlockRunner",
    "Compressed",
    "Pruned",
    "Pruner",
    "Repair",
    "Schedule",
    "SharedStats",
    "find_blocks",
    "get_pruner",
    "known_pruners",
    "known_repairs",
    "reconstruct",
    "register_pruner",
    "register_repair",
]
