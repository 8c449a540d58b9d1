"""What transformers knows of a model family, asked from transformers: its class, its names in files, its experts."""

from sparse_rt.families.build import auto_class, empty_model, predicts_next_token
from sparse_rt.families.experts import SplitExperts, loaded_names, split_experts
from sparse_rt.families.names import CheckpointNames

__all__ = [
    "CheckpointNames",
    "SplitExperts",
    "auto_class",
    "empty_model",
    "loaded_names",
    "predicts_next_token",
    "split_experts",
]
