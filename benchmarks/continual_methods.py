"""What continual_learning.py compares: how each method trains a sequence of tasks, and the perplexities it leaves.

EWC (Kirkpatrick et al., arXiv 1612.00796, diagonal Fisher information of the adapter's parameters, summed over tasks)
and replay are baselines of this benchmark, built on what an adapter may bring into a run (``TrainingParts``) and on the
rows; they are no features of the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import continual_domains as domains
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.adapters.registry import adapter_names, get_adapter
from sparse_rt.hf.load import load
from sparse_rt.training.options import training_arguments
from sparse_rt.training.run import Collator, trainable_parameters
from sparse_rt.training.trainer import SparseTrainer
from sparse_rt.workflows.eval import negative_log_likelihood

BATCH = 2
FISHER_ROWS = 24


@dataclass(frozen=True)
class Method:
    """``trials`` are values of ``tuned`` (learning_rate or strength), one of which is chosen on validation texts."""

    adapter: str
    trials: tuple[float, ...] = ()
    tuned: str = "learning_rate"
    like: str | None = None  # the method whose learning rate is taken over
    options: dict[str, Any] = field(default_factory=dict)
    replay: float = 0.0
    ewc: bool = False
    joint: bool = False
    switch: bool = False


NO_PENALTY = {"penalty": "none"}
METHODS: dict[str, Method] = {
    "spp": Method("spp", (1e-2, 3e-2, 1e-1)),
    "spp-replay": Method("spp", (1e-2, 3e-2, 1e-1), replay=0.05),
    "spp-ewc": Method("spp", (1e1, 1e2, 1e3), "strength", "spp", ewc=True),
    "masklora": Method("masklora", (1e-3, 4e-3, 1.6e-2)),
    "seft": Method("seft", (3e-4, 1e-3, 3e-3), options={"mode": "survivors", "interval": 16}),
    "dcft": Method("dcft", (1e-2, 3e-2, 1e-1), options=NO_PENALTY),
    "dcft-frob": Method("dcft", (1.0, 10.0, 100.0), "strength", "dcft", {"penalty": "frob"}),
    "dcft-cos": Method("dcft", (1.0, 10.0, 100.0), "strength", "dcft", {"penalty": "cos"}),
    "dcft-taylor": Method("dcft", (1e2, 1e3, 1e4), "strength", "dcft", {"penalty": "taylor"}),
    "dcft-switch": Method("dcft", like="dcft", options=NO_PENALTY, switch=True),
    "spp-joint": Method("spp", like="spp", joint=True),
}


def available() -> list[str]:
    return [name for name, method in METHODS.items() if method.adapter in adapter_names()]


@torch.no_grad()
def perplexities(model, split: str) -> list[float]:
    """On every domain, in order."""
    model.eval()
    found = []
    for domain in domains.DOMAINS:
        ids = domains.windows(domain)[split]
        total = sum(negative_log_likelihood(model, batch) for batch in ids.split(8))
        found.append(round(math.exp(total / (len(ids) * (domains.LENGTH - 1))), 4))
    return found


def rows_of(domain: str, seed: int, count: int) -> list[Tensor]:
    windows = domains.windows(domain)["train"]
    generator = torch.Generator().manual_seed(1000 * seed + domains.DOMAINS.index(domain))
    return [windows[i] for i in torch.randperm(len(windows), generator=generator)[:count].tolist()]


class EWC:
    """strength / 2 sum F (theta - theta*)^2, with the parameters after the last task as theta*."""

    def __init__(self, model, strength: float):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.strength = strength
        self.fisher = [torch.zeros_like(p) for p in self.parameters]
        self.anchor: list[Tensor] = []

    def after_task(self, model, rows: list[Tensor]) -> None:
        """Adds the mean square of the gradient of a text's log-likelihood; theta* becomes what theta is now."""
        model.eval()
        for row in rows[:FISHER_ROWS]:
            loss = model(row[None], labels=row[None], use_cache=False).loss * (len(row) - 1)
            for fisher, gradient in zip(self.fisher, torch.autograd.grad(loss, self.parameters), strict=True):
                fisher += gradient.square() / min(len(rows), FISHER_ROWS)
        self.anchor = [p.detach().clone() for p in self.parameters]

    def __call__(self) -> Tensor:
        terms = zip(self.fisher, self.parameters, self.anchor, strict=True)
        # Fisher of a text of LENGTH tokens; the loss is a mean over tokens.
        return self.strength / (2 * domains.LENGTH) * sum((f * (p - a).square()).sum() for f, p, a in terms)


def train(model, rows: list[Tensor], method: Method, rate: float, seed: int, room: Path, ewc: EWC | None) -> None:
    """One pass over ``rows`` in their order of the seed, with the product's Trainer."""
    options = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 1000,
        "use_cpu": True,
    }
    arguments = training_arguments(room, get_adapter(method.adapter), seed, options)
    data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in (r.tolist() for r in rows)]
    trainer = SparseTrainer(model, arguments, Collator(0), data)
    if ewc is not None and ewc.anchor:
        parts = trainer.parts
        trainer.parts = TrainingParts(parts.callbacks, parts.optimizer, (*parts.penalties, ewc))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def before_training(base: Path, split: str) -> list[float]:
    return perplexities(load(base, dtype=torch.float32), split)


def run(
    name: str,
    base: Path,
    seed: int,
    steps: int,
    rate: float,
    strength: float | None,
    room: Path,
    before: list[float] | None,
) -> dict[str, Any]:
    """Train the sequence of domains.

    With ``before``, the perplexities of the base model on the test texts, ``perplexities`` has that row and one after
    each task. Without it, in a trial, there is one row: validation texts, after the last task.
    """
    split = "validation" if before is None else "test"
    method = METHODS[name]
    set_seed(seed)
    options = dict(method.options)
    if method.tuned == "strength" and not method.ewc:
        options["similarity"] = strength
    config = get_adapter(method.adapter).config_cls(task_type="CAUSAL_LM", **options)
    plain = load(base, dtype=torch.float32)
    plain.config.use_cache = False
    model = get_peft_model(plain, config)
    count = trainable_parameters(model)
    table = [before]
    ewc = EWC(model, strength) if method.ewc else None
    if method.joint:
        rows = [row for domain in domains.DOMAINS for row in rows_of(domain, seed, steps * BATCH)]
        train(model, rows, method, rate, seed, room, None)
        return {"perplexities": [before, perplexities(model, split)], "trainable_parameters": count}
    seen: list[Tensor] = []
    for number, domain in enumerate(domains.DOMAINS):
        rows = rows_of(domain, seed, steps * BATCH)
        mixed = with_replay(rows, seen, method.replay, seed)
        if method.switch and number:
            model.add_adapter(f"task{number}", config)
            model.set_adapter(f"task{number}")
        elif number:
            model.base_model.continue_from_here("default")
        train(model, mixed, method, rate, seed, room, ewc)
        if ewc is not None:
            ewc.after_task(model, rows)
        seen += rows
        if before is None and number < len(domains.DOMAINS) - 1:
            continue
        found = perplexities(model, split)
        if method.switch:  # every domain is measured with its own vectors, and the base model before it has any
            found = [*table[-1][:number], found[number], *table[0][number + 1 :]]
        table.append(found)
    return {"perplexities": table if before else table[1:], "trainable_parameters": count}


def with_replay(rows: list[Tensor], seen: list[Tensor], share: float, seed: int) -> list[Tensor]:
    """``rows`` with a share of them replaced by rows of earlier tasks: the budget stays the same."""
    count = round(share * len(rows)) if seen else 0
    if not count:
        return rows
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(rows), generator=generator)[:count].tolist()
    drawn = torch.randperm(len(seen), generator=generator)[:count].tolist()
    mixed = list(rows)
    for place, row in zip(places, drawn, strict=True):
        mixed[place] = seen[row]
    return mixed
