"""Options of a training run: transformers' own names, our defaults, and refusals that name the nearest known option."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sparse_rt.adapters.base import AdapterConfig, SparseAdapterModel
from sparse_rt.config import number
from sparse_rt.errors import UserError

# What a run uses unless the user says otherwise; the learning rate belongs to the adapter. Weight decay, warm-up and
# epochs are those of SPP's recipe. Numbers below 1 are shares of all steps: about 100 points of the loss curve and 10
# checkpoints.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "weight_decay": 0.001,
    "warmup_steps": 0.03,
    "logging_steps": 0.01,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Every parameter of an adapter is used in every step; looking for others costs time and forbids checkpointing.
    "ddp_find_unused_parameters": False,
    # A loss of NaN must be seen: the run stops there.
    "logging_nan_inf_filter": False,
}
# Added when there is something to evaluate on: before the first step, ten times on the way, and at the end.
EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}
# Names of TrainingArguments that have a place of their own.
_ELSEWHERE = {"output_dir": "--output-dir", "seed": "--seed", "resume_from_checkpoint": "--resume"}
# Set by the adapter or by PEFT, not by the user.
NOT_OPTIONS = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"}
NOT_OPTIONS |= {"inference_mode", "base_digest"}


def adapter_config(adapter: type[SparseAdapterModel], options: dict[str, Any]) -> AdapterConfig:
    """The config of ``adapter`` for a causal language model; ``UserError`` for an unknown or ill-typed option."""
    known = {field.name: field for field in dataclasses.fields(adapter.config_cls) if field.name not in NOT_OPTIONS}
    _refuse_unknown(options, known, f"option of the adapter {adapter.name}")
    typed = {name: _typed(name, value, known[name].type) for name, value in options.items()}
    return adapter.config_cls(task_type="CAUSAL_LM", **typed)


def training_arguments(
    folder: Path, adapter: type[SparseAdapterModel], seed: int, options: dict[str, Any], evaluates: bool = False
):
    """``TrainingArguments`` from the user's options over our defaults; ``UserError`` names what is wrong."""
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in options.keys() & _ELSEWHERE.keys():
        raise UserError(f"training option {name!r} is set with {_ELSEWHERE[name]}")
    _refuse_unknown(options, known.keys() - _ELSEWHERE.keys(), "training option")
    typed = {name: _typed(name, value, known[name].type) for name, value in options.items()}
    merged = resolved(adapter, typed, evaluates)
    if not torch.accelerator.is_available():
        merged.setdefault("use_cpu", True)  # transformers refuses bf16 unless it is told so; no part of the run file
    try:
        return TrainingArguments(output_dir=str(folder), seed=seed, **merged)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training options: {' '.join(str(error).split())}") from error


def resolved(adapter: type[SparseAdapterModel], options: dict[str, Any], evaluates: bool = False) -> dict[str, Any]:
    """The training options as a run file shows them: ours where the user gave none."""
    evaluation = EVALUATION if evaluates else {}
    return {**DEFAULTS, "learning_rate": adapter.learning_rate, **evaluation, **options}


def _refuse_unknown(options: dict[str, Any], known, what: str) -> None:
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), n=3) or sorted(known)
            raise UserError(f"unknown {what}: {name!r}; nearest known are {', '.join(nearest[:12])}")


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """Numbers that arrive as text (YAML reads 2e-5 as text) become numbers; text for a number is refused."""
    written = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in written.split("|")}
    if value is False and name.endswith("_strategy"):
        return "no"  # as YAML reads an unquoted no
    if "str" in kinds or not kinds & {"int", "float"}:
        return value
    value = number(value)
    if value is None and "None" in kinds:
        return value
    if (isinstance(value, bool) and "bool" not in kinds) or not isinstance(value, int | float):
        raise UserError(f"option {name} is a number, got {value!r}")
    if "float" not in kinds:
        if value != int(value):
            raise UserError(f"option {name} is a whole number, got {value!r}")
        return int(value)
    return value
