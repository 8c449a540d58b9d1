"""Which parameter of a model a tensor of its checkpoint becomes, by the rules that transformers itself loads with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class CheckpointNames:
    """The names of ``model`` and of its checkpoints: renamed modules, and weights that are joined while loading.

    Checkpoints saved from the model without its head lack the prefix ("model."), and the reverse: transformers matches
    names with and without it.
    """

    def __init__(self, model: nn.Module):
        conversions = get_model_conversion_mapping(model)
        self.model = model
        self.prefix = getattr(model, "base_model_prefix", "")
        self.known = dict.fromkeys(model.state_dict(), True)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]

    def target(self, key: str) -> tuple[str, str | None]:
        """(parameter or buffer that ``key`` becomes or is joined into, pattern of the converter that does the latter).

        The name is one that the model does not have where transformers would not use the tensor.
        """
        rules = (self._renamings, self._converters), (self._renamings, []), ([], [])
        for renamings, converters in rules:
            name, pattern = rename_source_key(key, renamings, converters, self.prefix, self.known)
            if name in self.known:
                return name, pattern
        return self.renamed(key), None

    def renamed(self, key: str) -> str:
        """What the loader calls ``key`` before weights are joined."""
        return rename_source_key(key, self._renamings, [], self.prefix, self.known)[0]

    def parameter(self, key: str) -> str | None:
        """The parameter or buffer that tensor ``key`` is as it stands."""
        name, pattern = self.target(key)
        return name if pattern is None and name in self.known else None

    def joined(self, keys: Iterable[str]) -> dict[str, dict[str, str]]:
        """Parameters that are put together from several tensors: name -> {key: pattern}, keys in the loader's order."""
        found: dict[str, dict[str, str]] = {}
        for key in sorted(keys if self._converters else (), key=dot_natural_key):
            name, pattern = self.target(key)
            if pattern is not None:
                found.setdefault(name, {})[key] = pattern
        return found

    @torch.no_grad()
    def join(self, parameter: str, parts: Mapping[str, str], load: Callable[[str], Tensor]) -> Tensor:
        """``parameter`` from its ``parts`` ({key: pattern}, see ``joined``), each read with ``load``.

        Raises whatever transformers raises for parts that do not fit together.
        """
        converter = copy.deepcopy(next(c for c in self._converters if set(parts.values()) <= set(c.source_patterns)))
        for key, pattern in parts.items():
            converter.add_tensor(parameter, key, pattern, load(key))
        made = converter.convert(parameter, model=self.model, config=self.model.config)
        made = (made[0] if isinstance(made, tuple) else made)[parameter]  # the first releases of transformers 5: a pair
        return made[0] if isinstance(made, list) else made


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What ``save_pretrained`` calls the tensors ``names`` of ``model``: {name in the model: name in the file}."""
    pairs: dict[str, Any] = revert_weight_conversion(model, {name: name for name in names})
    return {name: saved for saved, name in pairs.items()}
