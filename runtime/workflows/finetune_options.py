"""From flat names, as a user writes them, to the parts of ``FinetuneOptions``: ours, the adapter's, the Trainer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_rt.config import FinetuneOptions, number, parse_assignments, read_yaml
from sparse_rt.errors import UserError

_PARTS = ("adapter_options", "trainer")


def finetune_options(
    given: dict[str, Any], config: str | Path | None = None, assignments: Sequence[str] = (), extra: Sequence[str] = ()
) -> FinetuneOptions:
    """Later wins: the YAML file ``config``, ``--set`` assignments, unrecognised flags ``extra``, the flags ``given``.

    A name is looked for in ``FinetuneOptions``, then in the adapter's config; everything else is meant for
    transformers' ``TrainingArguments``, which the workflow checks.
    """
    flat = {
        **(read_yaml(config) if config else {}),
        **parse_assignments(list(assignments)),
        **parse_flags(extra),
        **given,
    }
    values: dict[str, Any] = {part: dict(flat.pop(part, None) or {}) for part in _PARTS}
    adapter = flat.get("adapter", FinetuneOptions.model_fields["adapter"].default)
    theirs = _adapter_fields(adapter)
    for name, value in flat.items():
        if name in FinetuneOptions.model_fields:
            values[name] = value
        else:
            values["adapter_options" if name in theirs else "trainer"][name] = number(value)
    return FinetuneOptions.build(**values)


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """["--learning-rate", "1e-3", "--bf16"] -> {"learning_rate": 0.001, "bf16": True}; values are read as YAML."""
    parsed: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; options are written --name VALUE")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            parsed |= parse_assignments([f"{name}={value}"])
        elif remaining and not remaining[0].startswith("--"):
            parsed |= parse_assignments([f"{name}={remaining.pop(0)}"])
        else:
            parsed[name] = True
    return parsed


def _adapter_fields(adapter: str) -> set[str]:
    from sparse_rt.optional import require

    require("peft", extra="train")
    from sparse_rt.adapters.registry import get_adapter

    return {field.name for field in dataclasses.fields(get_adapter(adapter).config_cls)}
