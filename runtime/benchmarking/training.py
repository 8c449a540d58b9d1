"""A training step: SPP on the compressed model, LoRA of about as many parameters on the dense one.

Both come from PEFT and keep their parameters in float32; the base model is frozen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.benchmarking.models import Pair
from sparse_rt.benchmarking.rows import timed
from sparse_rt.nn import sparse_linears

LEARNING_RATE = 1e-4
SPP_GROUPS = 16


def adapter_plan(pair: Pair) -> dict[str, Any]:
    """Which layers both adapters change, the ``groups`` of SPP and the ``rank`` of LoRA; JSON."""
    shapes = [(weight.m, weight.n) for weight in pair.sparse.weights.values()]
    groups = math.gcd(SPP_GROUPS, *(m for m, _ in shapes))
    parameters = sum(groups * n + m for m, n in shapes)
    rank = max(1, round(parameters / sum(m + n for m, n in shapes)))
    return {"layers": sorted(pair.sparse.weights), "groups": groups, "rank": rank}


def adapted(model: nn.Module, plan: dict[str, Any]) -> nn.Module:
    """``model`` with its adapter, attached in place; ``UserError`` when PEFT is not installed."""
    from peft import LoraConfig, get_peft_model

    from sparse_rt.adapters.spp import SPPConfig  # imports PEFT, with our sentence when it is missing

    if next(sparse_linears(model), None):
        return get_peft_model(model, SPPConfig(groups=plan["groups"]))
    rank = plan["rank"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=plan["layers"]))


def random_tokens(model: nn.Module, batch: int, length: int) -> Tensor:
    """int64 [batch, length] on the device of the model; the time of a step does not depend on which tokens they are."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


class TrainingStep:
    """Forward, backward and AdamW on one fixed sequence; ``parameters`` are those that it trains."""

    def __init__(self, model: nn.Module, tokens: int):
        self.model = model.train()
        self.ids = random_tokens(model, 1, tokens)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)

    def run(self) -> float:
        """The loss before the step."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self) -> float:
        return timed(self.run, self.ids.device)[0]


def training_note(dense: TrainingStep, sparse: TrainingStep, plan: dict[str, Any]) -> str:
    """What the two steps train."""
    return (
        f"sparse: SPP, {plan['groups']} groups, {sparse.parameters} parameters; dense: LoRA, rank {plan['rank']}, "
        f"{dense.parameters} parameters; same {len(plan['layers'])} layers, AdamW"
    )
