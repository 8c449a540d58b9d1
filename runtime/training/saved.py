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

from sparse_rt.adapters.base import AdapterConfig, AdapterLayer, SparseAdapterModel
from sparse_rt.adapters.effective import Update, Weight, WeightShape
from sparse_rt.adapters.registry import adapter_names, get_adapter
from sparse_rt.checkpoint import Checkpoint, file_digest, read_header, read_json, resolve_model
from sparse_rt.errors import FormatError, UserError
from sparse_rt.families import loaded_names
from sparse_rt.formats import check_finite

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# PEFT saves the parameters of a model under the name they have inside of a PeftModel.
_PREFIX = "base_model.model."


class SavedAdapter:
    """Config and tensors of an adapter: ``parameters`` by module, ``replaced`` for modules saved as a whole.

    Both go by the names of the model. The methods take those of the checkpoint that was given to ``check``, where some
    families call their modules otherwise.
    """

    def __init__(self, folder: Path, adapter: type[SparseAdapterModel], config: AdapterConfig):
        self.folder, self.adapter, self.config = folder, adapter, config
        self.parameters: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.replaced: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}  # tensor of the checkpoint, a compressed weight as a dense one -> of the model

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
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                check_finite(key, tensor)
            module, _, last = key.removeprefix(_PREFIX).rpartition(".")
            if last.startswith(self.adapter.prefix) and last in self._parameter_names(module):
                self.parameters[module][last] = tensor
            else:
                self.replaced[key.removeprefix(_PREFIX)] = tensor

    def _parameter_names(self, module: str) -> tuple[str, ...]:
        return self.layer_class(module).parameter_names(self.config)

    def layer_class(self, module: str) -> type[AdapterLayer]:
        return self.adapter.layer_class(self.config, module)

    def check(self, checkpoint: Checkpoint) -> None:
        """``UserError`` unless every tensor fits ``checkpoint`` and every layer the config names is there."""
        dense = checkpoint.dense_tensors()
        if not self.parameters.keys() <= checkpoint.weights.keys() | {name.removesuffix(".weight") for name in dense}:
            self._names = loaded_names(checkpoint.folder, checkpoint.dense_shapes())
        shapes = {self._module(name): WeightShape(w.m, w.n, w.pattern, w.nnz) for name, w in checkpoint.weights.items()}
        vectors = {
            self._module(name.removesuffix(".weight")): WeightShape.vector(*checkpoint.tensors[name].shape)
            for name in dense
            if name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 1
        }
        for module, parameters in self.parameters.items():
            known = vectors if self.layer_class(module).adapts_vectors else shapes
            if module not in known:
                kind = "weight vector" if known is vectors else "compressed weight"
                raise UserError(f"the adapter changes {module}, which is no {kind} of {checkpoint.folder}")
            self._check_parameters(module, parameters, known[module])
        targeted = {name for name in (*shapes, *vectors) if self.adapter._check_target_module_exists(self.config, name)}
        for module in sorted(targeted - self.parameters.keys()):
            raise FormatError(f"{WEIGHTS_NAME} lacks {module}, which target_modules names; it is incomplete")
        stored = {self._names.get(name, name): checkpoint.tensors[name].shape for name in dense}
        for name, tensor in self.replaced.items():
            if stored.get(name) != tuple(tensor.shape):
                raise UserError(
                    f"the adapter's tensor {name} {tuple(tensor.shape)} has no counterpart in {checkpoint.folder}"
                )

    def _check_parameters(self, module: str, parameters: dict[str, Tensor], shape: WeightShape) -> None:
        layer = self.layer_class(module)
        reason = layer.refuse(self.config, shape.m, shape.n)
        if not (reason or layer.adapts_vectors):
            reason = layer.refuse_pattern(self.config, shape.pattern)
        if reason:
            raise UserError(f"the adapter does not fit {module}: {reason}")
        with torch.device("meta"):
            expected = layer.new_parameters(self.config, shape)
        for name, like in zip(self._parameter_names(module), expected, strict=True):
            found = tuple(parameters[name].shape) if name in parameters else "nothing"
            if found != tuple(like.shape):
                raise UserError(
                    f"the adapter has {found} for {name} of {module} ({shape.m}, {shape.n}), expected "
                    f"{tuple(like.shape)}; it belongs to another model or is damaged"
                )

    def digest(self) -> str:
        """sha256 of the parameters' file."""
        return file_digest(self.folder / WEIGHTS_NAME)

    def _module(self, name: str) -> str:
        """What the model calls the module whose weight the checkpoint calls ``name``, without ".weight"."""
        return self._names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    def changes(self, name: str) -> bool:
        """Whether the adapter has parameters for weight ``name``."""
        return self._module(name) in self.parameters

    def apply_to(self, name: str, weight: Weight) -> tuple[Weight, Update]:
        """Weight ``name`` that the adapter works on (its mask may have moved), and what it does to that."""
        module = self._module(name)
        return self.layer_class(module).apply_to(self.config, weight, self._of(module))

    def moves_mask(self, name: str, pattern: str) -> bool:
        module = self._module(name)
        return module in self.parameters and self.layer_class(module).moves_mask(self.config, pattern)

    def dense(self, name: str, stored: Tensor) -> Tensor:
        """The dense tensor ``name`` as merging leaves it, not rounded to the dtype of ``stored`` yet."""
        name = self._names.get(name, name)
        if name in self.replaced:
            return self.replaced[name].to(stored.dtype)
        module, _, tensor = name.rpartition(".")
        if module not in self.parameters:
            return stored
        return self.layer_class(module).dense_change(self.config, tensor, stored, *self._of(module))

    def _of(self, module: str) -> tuple[Tensor, ...]:
        return tuple(self.parameters[module][name] for name in self._parameter_names(module))


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
