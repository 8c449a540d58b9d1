"""DCFT (Wang, Wang, Yin: Dependency-aware continual learning fine-tuning, Neurocomputing 636, 129897, 2025).

Two matrices that are applied one after the other share one diagonal map, a vector m of one entry a channel:

    qk   scores   x W_q^T W_k x        q side: rows of W_q        k side: rows of W_k
    vo   values   W_o P x W_v^T        v side: rows of W_v        o side: columns of W_o
    ud   MLP      W_d (act(g) . u)     up side: rows of W_up      down side: columns of W_down

A diagonal map only scales rows or columns, so it keeps every mask and merges exactly; bias entries scale with their
rows. In training it scales outputs or inputs of the layer: two products, no gradient of a weight. A penalty keeps the
map of a task near that of the task before it (``penalties``), which is meant to keep what that task has learned.

**What is known and what is our reading.** The body of the paper is not public, nor is its code. Its abstract says: a
pair of matrices that used to be trained apart shares one set of trainables, 0.011 per mille of extra parameters;
fine-tuning is a mapping of the matrix space, and the mappings of successive tasks are kept similar. That the pairs are
Q-K and V-O with one vector each (737,280 entries on LLaMA-2-70B, 0.0107 per mille: the only such choice without
groups that gives this figure), that the map is a diagonal, and the form of the similarity are our reading of it. Other
readings are options:

- ``units``: also the pair up-down, or fewer pairs;
- ``side_qk``, ``side_vo``, ``side_ud``: which matrix of a pair is scaled. With grouped-query attention the sides have
  different widths and the wider one is the more general; elsewhere both say the same;
- ``rope_tied``: a map that acts between the rotated queries and keys must have equal entries in the two channels that a
  rotary embedding turns together. Untied, the map acts before the rotation, and the q and the k side differ;
- ``share``: consecutive channels that share an entry (group sharing, of a later paper of the same line);
- ``penalty``: how the similarity of two maps is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from sparse_rt.adapters.base import AdapterConfig, AdapterLayer, SparseAdapterModel, base_of, short_names
from sparse_rt.adapters.dcft import layers, penalties, sides
from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.adapters.registry import register_adapter
from sparse_rt.errors import UserError

ALL_LINEAR = "all-linear"


@dataclass
class DCFTConfig(AdapterConfig):
    """Options of DCFT; the module's text says which of them are readings of the paper."""

    units: list[str] | str = field(
        default_factory=lambda: ["qk", "vo"], metadata={"help": "pairs that share a map, of qk, vo and ud"}
    )
    side_qk: str = field(default="q", metadata={"help": "matrix of the pair qk that is scaled: q or k"})
    side_vo: str = field(default="v", metadata={"help": "matrix of the pair vo that is scaled: v or o"})
    side_ud: str = field(default="down", metadata={"help": "matrix of the pair ud that is scaled: up or down"})
    rope_tied: bool = field(
        default=False, metadata={"help": "one entry for the two channels that a rotary embedding turns together"}
    )
    share: int = field(default=1, metadata={"help": "consecutive channels that share an entry"})
    penalty: str = field(
        default="frob", metadata={"help": "distance to the map of the task before: none, frob, cos or taylor"}
    )
    similarity: float = field(default=1.0, metadata={"help": "weight of the penalty (lambda)"})
    head_dim: int | None = field(
        default=None, metadata={"help": "channels of an attention head; taken from the model's config"}
    )

    name: ClassVar[str] = "dcft"
    free_options: ClassVar[frozenset[str]] = AdapterConfig.free_options | {"penalty", "similarity"}

    def __post_init__(self):
        super().__post_init__()
        units = self.units
        units = units.replace("+", ",").split(",") if isinstance(units, str) else list(units)
        units = [unit.strip() for unit in units]
        if not units or set(units) - set(sides.UNITS):
            raise UserError(f"units are some of {', '.join(sides.UNITS)}, got {self.units!r}")
        self.units = [unit for unit in sides.UNITS if unit in units]
        for unit, allowed in sides.UNITS.items():
            _refuse_other(f"side_{unit}", getattr(self, f"side_{unit}"), allowed)
        _refuse_other("penalty", self.penalty, penalties.KINDS)
        if self.share < 1:
            raise UserError(f"share must be at least 1, got {self.share!r}")
        if not self.similarity >= 0:
            raise UserError(f"similarity must be at least 0, got {self.similarity!r}")
        if self.dropout:
            raise UserError("dcft scales channels and has no branch that dropout could act on; leave dropout at 0")


def _refuse_other(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} must be {' or '.join(allowed)}, got {value!r}")


@register_adapter
class DCFTModel(SparseAdapterModel):
    name = "dcft"
    prefix = "dcft_"
    config_cls = DCFTConfig
    tuner_layer_cls = layers.Scale
    learning_rate = 2e-3  # ours: the paper's is not known

    @classmethod
    def layer_class(cls, config: DCFTConfig, name: str) -> type[AdapterLayer]:
        return sides.layer_class(config, name)

    def _prepare_adapter_config(self, peft_config: DCFTConfig, model_config: dict) -> DCFTConfig:
        if peft_config.rope_tied and "qk" in peft_config.units:
            sides.refuse_rotary(self.model, model_config)
            if peft_config.head_dim is None:
                peft_config.head_dim = sides.head_dim(model_config)
        return peft_config

    def _prepare_model(self, peft_config: DCFTConfig, model: nn.Module) -> None:
        targets = peft_config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
            peft_config.target_modules = short_names(sides.targets(peft_config, model), model)
        super()._prepare_model(peft_config, model)

    def _refuse_target(self, config: DCFTConfig, name: str, module: nn.Module) -> None:
        layer_class = self.layer_class(config, name)
        if not layer_class.adapts_vectors:
            super()._refuse_target(config, name, module)
            return
        norm = base_of(module)
        reason = sides.refuse_norm(norm) or layer_class.refuse(config, norm.weight.numel(), 1)
        if reason:
            raise UserError(f"dcft cannot adapt {name}: {reason}")

    def continue_from_here(self, adapter_name: str) -> None:
        for layer in self._layers(adapter_name):
            layer.keep_reference(adapter_name)

    def training_parts(self, arguments) -> TrainingParts:
        """The penalty of the adapter that is trained, toward the map it was started from (first task: the identity)."""
        (name,) = self.active_adapters
        return penalties.training_parts(self._layers(name), name, self.peft_config[name], arguments)

    def _layers(self, adapter_name: str) -> list[layers.Scale]:
        found = (module for module in self.model.modules() if isinstance(module, layers.Scale))
        return [layer for layer in found if adapter_name in layer.adapter_options]


def map_of(layer: layers.Scale, adapter_name: str = "default") -> torch.Tensor:
    """The map m of one adapted layer, an entry a channel."""
    return layer.scale([adapter_name]).detach()
