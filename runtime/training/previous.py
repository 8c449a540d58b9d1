"""An earlier adapter of the same base that a run goes on from: a sequence of tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from sparse_rt.adapters.base import AdapterConfig, SparseAdapterModel
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import UserError
from sparse_rt.training.options import NOT_OPTIONS
from sparse_rt.training.saved import WEIGHTS_NAME, SavedAdapter


def open_previous(
    folder: str | Path | None, adapter: type[SparseAdapterModel], checkpoint: Checkpoint, base_digest: str
) -> SavedAdapter | None:
    """The saved adapter, if any; ``UserError`` when it is of another kind than ``adapter`` or of another base."""
    if folder is None:
        return None
    saved = SavedAdapter.open(folder)
    if saved.adapter is not adapter:
        raise UserError(
            f"{folder} is an adapter of the kind {saved.adapter.name} and this run trains {adapter.name}; give an "
            f"adapter of that kind, or merge {folder} into the model first and train on the merged model"
        )
    trained_on = saved.config.base_digest
    if trained_on != base_digest:
        of = "does not say which weights it was trained on" if trained_on is None else "was trained on other weights"
        raise UserError(
            f"{folder} {of} (it names {saved.config.base_model_name_or_path}) and this run trains on "
            f"{checkpoint.folder}; give the model it was trained on"
        )
    saved.check(checkpoint)
    return saved


def start_from(model, saved: SavedAdapter, adapter_name: str = "default") -> None:
    """Give the fresh adapter of a ``PeftModel`` the parameters of ``saved``; ``UserError`` for other options."""
    _refuse_other_options(saved, model.peft_config[adapter_name])
    set_peft_model_state_dict(model, load_file(saved.folder / WEIGHTS_NAME), adapter_name)
    model.base_model.continue_from_here(adapter_name)


def _refuse_other_options(saved: SavedAdapter, config: AdapterConfig) -> None:
    free = NOT_OPTIONS | config.free_options
    differ = {
        name: (before, now)
        for name in (field.name for field in dataclasses.fields(config))
        if name not in free and (before := _plain(saved.config, name)) != (now := _plain(config, name))
    }
    if differ:
        told = "; ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in differ.items())
        raise UserError(f"cannot go on from {saved.folder}, which was made with other options: {told}")


def _plain(config: AdapterConfig, name: str) -> Any:
    value = getattr(config, name, None)
    return sorted(value) if isinstance(value, set | list | tuple) else value
