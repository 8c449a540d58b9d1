"""Proof of a merge, before it is published: the same mask (or as many weights), finite values, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import CheckFailed
from sparse_rt.training.saved import SavedAdapter

# Relative difference (Frobenius norm) of the logits of base + adapter and of the merged model, both computed in the
# dtype of the merged values. The fused form rounds the same values the same way, which gives 0 on one backend; the
# bounds leave room for another summation order and for adapters whose update is kept apart (exact).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SEQUENCES, TOKENS = 2, 32


def check_masks(base: Checkpoint, merged: Checkpoint, adapter: SavedAdapter) -> None:
    """``CheckFailed`` unless every metadata tensor is the same, byte for byte, and the data is legal and finite.

    Where the adapter moves the mask: unless it keeps exactly as many weights, legal in the pattern.
    """
    for name, entry in base.weights.items():
        metadata = base.load_weight(name, check=False)[1]
        # load_weight checks popcount, nibbles, the number of each group and padding, and refuses NaN and Inf.
        found = merged.load_weight(name)[1]
        if entry.pattern == merged.weights[name].pattern and torch.equal(found, metadata):
            continue
        if entry.pattern != merged.weights[name].pattern or not adapter.moves_mask(name, entry.pattern):
            raise CheckFailed(f"the mask of {name} is not that of the base model; nothing was written")
        if merged.weights[name].nnz != entry.nnz:
            raise CheckFailed(
                f"{name} would keep {merged.weights[name].nnz:,} weights, the base model keeps {entry.nnz:,}: the "
                "adapter was saved before its training ended; finish it and merge that, nothing was written"
            )


def compare_logits(base: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Logits of base + adapter, unmerged, against those of the merged folder on fixed tokens.

    Returns the relative error, its bound, the size of the adapter's own effect, and the share of equal top tokens.
    One model is in memory at a time.
    """
    from peft import PeftModel

    from sparse_rt.hf.load import load

    model = PeftModel.from_pretrained(load(base, dtype=dtype), str(adapter)).eval()
    tokens = fixed_tokens(model.config)
    expected = _logits(model, tokens)
    with model.disable_adapter():
        plain = _logits(model, tokens)
    del model
    found = _logits(load(merged, dtype=dtype), tokens)
    size = expected.norm()
    return {
        "logits_error": float((found - expected).norm() / size),
        "logits_tolerance": TOLERANCE[dtype],
        "adapter_effect": float((expected - plain).norm() / size),
        "top_token_agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def refuse_different(found: dict[str, Any]) -> None:
    """``CheckFailed`` when the logits differ by more than the bound (NaN differs from everything)."""
    if not found["logits_error"] <= found["logits_tolerance"]:
        raise CheckFailed(
            f"the merged model's logits differ from base + adapter by {found['logits_error']:.2%}, allowed are "
            f"{found['logits_tolerance']:.2%}; nothing was written"
        )


def fixed_tokens(config) -> Tensor:
    """int64 [SEQUENCES, TOKENS], the same for every merge of a model."""
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    return torch.randint(config.vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model, tokens: Tensor) -> Tensor:
    return model(tokens.to(model.device)).logits.float().cpu()
