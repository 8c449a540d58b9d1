"""Rows in a padded batch: which tokens are theirs, and their name by content."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def real_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """bool [batch, length]: True for tokens that are no padding.

    Packed rows have no mask: their padding repeats the position 0, where a text of their own would go on with 1.
    """
    if "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    if "position_ids" in inputs:
        positions = inputs["position_ids"]
        following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
        return (positions > 0) | (following == 1)
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool)


def row_key(tokens, positions=None) -> bytes:
    """sha256 of what a model sees of a row: tokens and, where texts are packed, positions, without padding."""
    parts = [np.asarray(part, dtype=np.int32).tobytes() for part in (tokens, positions) if part is not None]
    return hashlib.sha256(b"".join(parts)).digest()
