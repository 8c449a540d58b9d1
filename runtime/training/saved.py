"""A saved adapter folder, checked against the compressed model it is meant for."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from sparse_rt.adapters.base import AdapterConfig, SparseAdapterModel
from sparse_rt.adapters.effective import Update, Weight, WeightShape
from sparse_rt.adapters.registry import adapter_names, get_adapter
from sparse_rt.checkpoint import Checkpoint, WeightEntry, read_header, read_json, resolve_model
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import check_finite

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# PEFT saves the parameters of a model under the name they have inside of a PeftModel.
_PREFIX = "base_model.model."


class SavedAdapter:
    """Config and tensors of an adapter: ``parameters`` by module, ``replaced`` for modules saved as a whole."""

    def __init__(self, folder: Path, adapter: type[SparseAdapterModel], config: AdapterConfig):
        self.folder, self.adapter, self.config = folder, adapter, config
        self.parameters: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.replaced: dict[str, Tensor] = {}

    @classmethod
    def open(cls, adapter: str | Path) -> SavedAdapter:
        """Read a folder or hub adapter; ``FormatError`` for damage, ``UserError`` for an adapter of another kind."""
        folder = resolve_model(adapter)
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(f"{adapter} is no adapter: it has no {CONFIG_NAME}; give what `sparse-rt finetune` wrote")
        kind = str(read_json(folder / CONFIG_NAME).get("peft_type")).lower()
        if kind not in adapter_names():
            raise UserError(
                f"{adapter} is an adapter of the type {kind.upper()}, which does not keep the mask; "
                f"known are {', '.join(adapter_names())}"
            )
        saved = cls(folder, get_adapter(kind), _read_config(folder))
        saved._read_tensors()
        return saved

    def _read_tensors(self) -> None:
        path = self.folder / WEIGHTS_NAME
        if not path.is_file():
            raise FormatError(f"{path} is missing; the adapter was not copied as a whole")
        read_header(path)  # a truncated or foreign file, in our words
        names = {name.removeprefix(self.adapter.prefix): name for name in self._parameter_names}
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                check_finite(key, tensor)
            module, _, last = key.removeprefix(_PREFIX).rpartition(".")
            if last.removeprefix(self.adapter.prefix) in names and last.startswith(self.adapter.prefix):
                self.parameters[module][last] = tensor
            else:
                self.replaced[key.removeprefix(_PREFIX)] = tensor

    @property
    def _parameter_names(self) -> tuple[str, ...]:
        return self.adapter.tuner_layer_cls.adapter_layer_names

    def check(self, checkpoint: Checkpoint) -> None:
        """``UserError`` unless every tensor fits ``checkpoint`` and every layer the config names is there."""
        for module, parameters in self.parameters.items():
            if module not in checkpoint.weights:
                raise UserError(f"the adapter changes {module}, which is no compressed weight of {checkpoint.folder}")
            self._check_parameters(module, parameters, checkpoint.weights[module])
        targeted = {name for name in checkpoint.weights if self.adapter._check_target_module_exists(self.config, name)}
        for module in sorted(targeted - self.parameters.keys()):
            raise FormatError(f"{WEIGHTS_NAME} lacks {module}, which target_modules names; it is incomplete")
        for name, tensor in self.replaced.items():
            entry = checkpoint.tensors.get(name)
            if entry is None or entry.shape != tuple(tensor.shape) or name in checkpoint.compressed_tensors():
                raise UserError(
                    f"the adapter's tensor {name} {tuple(tensor.shape)} has no counterpart in {checkpoint.folder}"
                )

    def _check_parameters(self, module: str, parameters: dict[str, Tensor], entry: WeightEntry) -> None:
        layer = self.adapter.tuner_layer_cls
        reason = layer.refuse(self.config, entry.m, entry.n)
        if reason:
            raise UserError(f"the adapter does not fit {module}: {reason}")
        with torch.device("meta"):
            expected = layer.new_parameters(self.config, WeightShape(entry.m, entry.n, entry.pattern, entry.nnz))
        for name, like in zip(self._parameter_names, expected, strict=True):
            found = tuple(parameters[name].shape) if name in parameters else "nothing"
            if found != tuple(like.shape):
                raise UserError(
                    f"the adapter has {found} for {name} of {module} ({entry.m}, {entry.n}), expected "
                    f"{tuple(like.shape)}; it belongs to another model or is damaged"
                )

    def update(self, module: str) -> Update:
        """What the adapter does to the weight of ``module``."""
        layer = self.adapter.tuner_layer_cls
        parameters = tuple(self.parameters[module][name] for name in self._parameter_names)
        return layer.update_of(self.config, parameters)


def compressed_weight(checkpoint: Checkpoint, name: str) -> Weight:
    """The compressed weight ``name``, read and checked."""
    entry = checkpoint.weights[name]
    return Weight.of(*checkpoint.load_weight(name), entry.pattern, entry.m, entry.n)


def _read_config(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of a newer release are left out, as PEFT does
        try:
            return PeftConfig.from_pretrained(str(folder))
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"{folder / CONFIG_NAME}: {' '.join(str(error).split())}") from error
