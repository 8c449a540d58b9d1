"""Whether two engines say the same: greedy tokens against transformers, with a rule for near ties.

Engines round in different places, so the same weights give logits that differ in the last bits. Where the two best
tokens are that close, either is right, and everything after the first difference has another context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# A difference is a near tie when transformers' logits of the two tokens are within this many units in the last place
# of the model's dtype, at the size of the best logit.
NEAR_TIE_ULPS = 4


def greedy(model, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy continuations by transformers: for each prompt ``tokens`` and float32 ``logits`` [steps, vocabulary]."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,  # nothing is padded; without it generate() warns
            )
        results.append({"tokens": out.sequences[0, ids.shape[1] :].tolist(), "logits": torch.cat(out.logits).cpu()})
    return results


def compare(reference: list[dict[str, Any]], tokens: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, Any]:
    """Compare ``tokens`` of another engine with ``greedy`` results, each prompt up to its first difference.

    Returns ``compared`` and ``equal`` (tokens), ``near_ties`` and ``differences`` (each with prompt, step, both tokens,
    the gap between their logits and the gap that counts as a tie).
    """
    report: dict[str, Any] = {"compared": 0, "equal": 0, "near_ties": [], "differences": []}
    for number, (expected, found) in enumerate(zip(reference, tokens, strict=True)):
        wanted = expected["tokens"]
        same = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
        if same is None and len(wanted) == len(found):
            report["compared"] += len(wanted)
            report["equal"] += len(wanted)
            continue
        step = min(len(wanted), len(found)) if same is None else same
        report["compared"] += step + 1
        report["equal"] += step
        first = _first_difference(expected["logits"], wanted, list(found), step, dtype)
        kind = "near_ties" if first["gap"] is not None and first["gap"] <= first["tie_gap"] else "differences"
        report[kind].append({"prompt": number, **first})
    return report


def _first_difference(logits, wanted: list[int], found: list[int], step: int, dtype: torch.dtype) -> dict[str, Any]:
    if step >= len(wanted) or step >= len(found):  # one engine stopped where the other went on
        return {"step": step, "expected": wanted[step : step + 1], "found": found[step : step + 1], "gap": None}
    best = logits[step, wanted[step]].item()
    gap = best - logits[step, found[step]].item()
    tie = NEAR_TIE_ULPS * torch.finfo(dtype).eps * abs(best)
    return {
        "step": step,
        "expected": wanted[step],
        "found": found[step],
        "gap": round(gap, 6),
        "tie_gap": round(tie, 6),
    }
