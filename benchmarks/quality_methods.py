"""What quality.py does to a pruned model: one function a kind of method, and the perplexities of the result."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from sparse_rt import assets
from sparse_rt.adapters.registry import get_adapter
from sparse_rt.config import ConvertOptions, FinetuneOptions, MergeOptions
from sparse_rt.data import read_texts, token_windows, training_dataset
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.nn import sparse_linears
from sparse_rt.training.options import training_arguments
from sparse_rt.training.run import Collator, attach, trainable_parameters
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.eval import negative_log_likelihood
from sparse_rt.workflows.finetune import finetune
from sparse_rt.workflows.merge import merge

ADAPTERS = ("spp", "masklora", "seft", "dcft", "values")
TRAINED = (*ADAPTERS, "lora-remask")
METHODS = (*TRAINED, "reconstruct")
# Not part of a whole run: the yardstick of SPP, eight times as slow.
REFERENCE = "spp-float64"
# The parameters of LoRA with rank 8; DCFT and values have no such choice. SEFT evolves four times in 48 steps, in its
# default mode: the mask of an unstructured weight moves, that of 2:4 stays.
ADAPTER_OPTIONS: dict[str, dict[str, Any]] = {
    "spp": {"groups": 16},
    "masklora": {"r": 8},
    "seft": {"rank": 8, "interval": 12},
}
LORA_RANK, LORA_ALPHA = 8, 16
BATCH, LENGTH, CONTEXT = 4, 256, 512
CALIBRATION = {"num_samples": 128, "max_seq_len": 512}
# The first of so many windows of the held-out text choose learning rates, the others are the table's.
VALIDATION_WINDOWS = 25


def default_rate(method: str) -> float:
    return get_adapter({"lora-remask": "masklora", REFERENCE: "spp"}.get(method, method)).learning_rate


def pruned(workdir: Path, base: tuple[str, str, float], **options: Any) -> Path:
    """The shipped model pruned as ``base`` says, made once for all processes (the slower one keeps the first's)."""
    pruner, pattern, sparsity = base
    named = "".join(f"-{name}{value}" for name, value in options.items())
    folder = workdir / f"{pruner}-{pattern.replace(':', 'of')}-{sparsity}{named}"
    if not folder.exists():
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        convert(
            ConvertOptions.build(
                model=str(assets.model_dir()),
                output_dir=own,
                pattern=pattern,
                sparsity=sparsity,
                method=pruner,
                **CALIBRATION,
                **options,
            )
        )
        if not folder.exists():
            own.rename(folder)
    return folder


def perplexities(
    method: str,
    folder: Path,
    base: tuple[str, str, float],
    room: Path,
    seed: int,
    rate: float | None,
    steps: int,
    validation: bool,
) -> dict[str, Any]:
    """Train ``method`` on the pruned model in ``folder`` and measure what comes out of it."""
    facts: dict[str, Any] = {}
    if method == "dense":
        model = load(assets.model_dir())
    elif method == "pruned":
        model = load(folder)
    elif method == "reconstruct":
        # A step of reconstruction takes two calibration sequences of 512 tokens: as many tokens as one of training.
        model = load(pruned(room, base, reconstruct=steps, seed=seed))
    elif method in DENSE:
        model, facts = DENSE[method](folder, room, seed, rate, steps)
    else:
        model, facts = adapted(method, folder, room, seed, rate, steps)
    name = "validation_perplexity" if validation else "perplexity"
    return {**facts, name: round(_perplexity(model.eval(), validation), 4)}


def _perplexity(model, validation: bool) -> float:
    windows = token_windows(read_texts(assets.heldout_text()), load_tokenizer(assets.model_dir()), CONTEXT)
    chosen = windows[:VALIDATION_WINDOWS] if validation else windows[VALIDATION_WINDOWS:]
    total = sum(negative_log_likelihood(model, batch) for batch in chosen.split(4))
    return math.exp(total / (len(chosen) * (CONTEXT - 1)))


def _trainer_options(rate: float, steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "save_strategy": "no",
        "logging_steps": 10,
    }


def adapted(method: str, folder: Path, room: Path, seed: int, rate: float, steps: int):
    """`finetune` and `merge`, as a user runs them."""
    result = finetune(
        FinetuneOptions.build(
            model=str(folder),
            output_dir=room / "adapter",
            adapter=method,
            adapter_options=ADAPTER_OPTIONS.get(method, {}),
            max_seq_len=LENGTH,
            seed=seed,
            trainer=_trainer_options(rate, steps),
        )
    )
    merge(MergeOptions.build(model=str(folder), adapter=str(room / "adapter"), output_dir=room / "merged"))
    kept = ("trainable_parameters", "tokens", "first_loss", "last_loss")
    return load(room / "merged"), {name: result[name] for name in kept} | {"train_seconds": result["seconds"]}


def lora_then_remask(folder: Path, room: Path, seed: int, rate: float, steps: int):
    """PEFT's LoRA on the same weights stored densely; after merging, what is not kept becomes zero again."""
    from peft import LoraConfig, get_peft_model

    masks = {name: layer.mask() for name, layer in sparse_linears(load(folder))}
    set_seed(seed)
    targets = sorted({name.rpartition(".")[2] for name in masks})
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, dequantize=True), config)
    facts = _train_dense(model, folder, room, seed, rate, steps)
    merged = model.merge_and_unload()
    with torch.no_grad():
        for name, mask in masks.items():
            weight = merged.get_submodule(name).weight
            weight.mul_(mask.to(weight.dtype))
    return merged, facts


class DenseSPP(nn.Module):
    """SPP as published, on a dense weight with zeros: W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]), all in float64."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.register_buffer("weight", weight.double())
        self.a, self.b = (nn.Parameter(factor.detach().double()) for factor in (a, b))
        self.scale = scale

    def effective(self) -> Tensor:
        rows = self.a.repeat_interleave(len(self.weight) // len(self.a), dim=0)
        return self.weight + self.scale * self.b[:, None] * rows * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective())


def spp_in_float64(folder: Path, room: Path, seed: int, rate: float, steps: int):
    """The whole model in float64 with ``DenseSPP`` layers that start where the product's adapter starts."""
    config = get_adapter("spp").config_cls(**ADAPTER_OPTIONS["spp"])
    set_seed(seed)
    adapted = attach(load(folder), config, str(folder), None, "").base_model.model
    model = load(folder, dequantize=True).double().requires_grad_(False)
    names = [name for name, _ in sparse_linears(load(folder))]
    for name in names:
        layer, parent = adapted.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        a, b = layer.spp_A["default"], layer.spp_B["default"]
        setattr(parent, name.rpartition(".")[2], DenseSPP(model.get_submodule(name).weight, a, b, config.scale))
    facts = _train_dense(model, folder, room, seed, rate, steps)
    merged = load(folder, dequantize=True)
    with torch.no_grad():
        for name in names:
            merged.get_submodule(name).weight.copy_(model.get_submodule(name).effective())
    return merged, facts


def _train_dense(model, folder: Path, room: Path, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """transformers' Trainer over the batches that `finetune` takes."""
    tokenizer = load_tokenizer(folder)
    dataset = training_dataset(None, tokenizer, LENGTH, seed)
    arguments = training_arguments(room / "dense", get_adapter("masklora"), seed, _trainer_options(rate, steps))
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), dataset)
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    return {
        "trainable_parameters": trainable_parameters(model),
        "tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": round(result.metrics["train_runtime"], 3),
    }


# Methods that train a dense model.
DENSE = {"lora-remask": lora_then_remask, "spp-float64": spp_in_float64}
