"""Choosing which weights stay, and calibrating that choice on a model's own activations, one block at a time."""

from sparse_rt.pruning.base import Pruner, get_pruner, known_pruners, register_pruner
from sparse_rt.pruning.calibrate import BlockRunner, find_blocks
from sparse_rt.pruning.statistics import ActivationStats

__all__ = [
    "ActivationStats",
    "BlockRunner",
    "Pruner",
    "find_blocks",
    "get_pruner",
    "known_pruners",
    "register_pruner",
]
