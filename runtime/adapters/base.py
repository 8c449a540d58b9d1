"""What all adapters share: options, the layer around a ``SparseLinear``, and the PEFT tuner that attaches it.

A new adapter is one file with three classes: options (``AdapterConfig``), layer (``new_parameters`` and ``update``, and
``fused`` where there is a kernel for it) and tuner (``@register_adapter``). See ``spp.py``.
"""

from __future__ import annotations

import functools
import logging
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sparse_rt.adapters.effective import Fused, Rows, Update, Weight, WeightShape, adapted_linear, merged_values
from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.adapters.peft_hooks import ReplaceWithoutWeight
from sparse_rt.errors import UserError
from sparse_rt.nn import SparseLinear, sparse_linears

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


@dataclass
class AdapterConfig(PeftConfig):
    """Options every adapter has; names and meanings as in PEFT's own configs."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "compressed layers to adapt: names, a regular expression, all-linear; default: all of them"},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers not to adapt"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained and saved as a whole, such as norms"}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indexes of layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    dropout: float = field(
        default=0.0, metadata={"help": "dropout before the update; above 0 each layer takes two products, not one"}
    )
    exact: bool = field(
        default=False,
        metadata={"help": "base and update in two products, so that no small update is rounded away in bfloat16"},
    )
    base_digest: str | None = field(
        default=None, metadata={"help": "digest of the compressed weights trained on; `merge` compares it"}
    )

    name: ClassVar[str]
    # What may differ between an adapter and the earlier one it goes on from.
    free_options: ClassVar[frozenset[str]] = frozenset({"dropout", "exact"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(self.name.upper())
        for option in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, option), list):
                setattr(self, option, set(getattr(self, option)))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be from 0 up to (not including) 1, got {self.dropout!r}")

    def to_dict(self) -> dict:
        """As PEFT saves it, with sets as sorted lists: the same adapter gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


class AdapterLayer(nn.Module, BaseTunerLayer):
    """The adapters of one ``SparseLinear``; parameters live in one ``ParameterDict`` each, keyed by adapter name."""

    adapter_layer_names: tuple[str, ...] = ()
    # What is saved with them and not trained, such as positions; they belong into ``other_param_names`` too.
    frozen_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: tuple[str, ...] = ("adapter_options",)
    # Whether the base layer is a norm with one vector as its weight, not a SparseLinear.
    adapts_vectors: ClassVar[bool] = False

    def __init__(self, base_layer: SparseLinear, adapter_name: str, config: AdapterConfig):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_options: dict[str, AdapterConfig] = {}
        for name in (*self.adapter_layer_names, *self.frozen_names):
            self.add_module(name, nn.ParameterDict())
        if isinstance(base_layer, nn.Linear):
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._blocks = None
        self._unmerged: dict[str, Tensor] = {}
        self.update_layer(adapter_name, config)

    @classmethod
    def refuse(cls, config: AdapterConfig, m: int, n: int) -> str | None:
        """Why a layer (m, n) cannot be adapted with ``config``, or None."""
        return None

    @classmethod
    def refuse_pattern(cls, config: AdapterConfig, pattern: str) -> str | None:
        """Why a layer of ``pattern`` cannot be adapted with ``config``, or None."""
        return None

    @classmethod
    def moves_mask(cls, config: AdapterConfig, pattern: str) -> bool:
        """Whether merging may keep other positions than the base weight does, as many in all."""
        return False

    @classmethod
    def new_parameters(cls, config: AdapterConfig, shape: WeightShape) -> tuple[Tensor, ...]:
        """Fresh float32 parameters in the order of ``parameter_names``; the adapter must start as the identity."""
        raise NotImplementedError

    @classmethod
    def parameter_names(cls, config: AdapterConfig) -> tuple[str, ...]:
        """Those of ``adapter_layer_names`` that an adapter with these options has."""
        return cls.adapter_layer_names

    @staticmethod
    def update(config: AdapterConfig, rows: Rows, *parameters: Tensor) -> Tensor:
        """What the adapter adds to ``rows.values``: same shape, differentiable in the parameters."""
        raise NotImplementedError

    @staticmethod
    def fused(config: AdapterConfig) -> Fused | None:
        """A faster way to do what ``update`` does, or None."""
        return None

    @staticmethod
    def dense_change(config: AdapterConfig, name: str, tensor: Tensor, *parameters: Tensor) -> Tensor:
        """What merging makes of a tensor of the base layer that is not compressed (``bias``), not rounded yet."""
        return tensor

    @classmethod
    def update_of(cls, config: AdapterConfig, parameters: tuple[Tensor, ...]) -> Update:
        """What an adapter with these options and parameters does to a weight."""
        return Update(functools.partial(cls.update, config), parameters, cls.fused(config))

    @classmethod
    def apply_to(cls, config: AdapterConfig, weight: Weight, parameters: tuple[Tensor, ...]) -> tuple[Weight, Update]:
        """The weight that such an adapter works on, which has another mask if it moves it, and what it does to that."""
        return weight, cls.update_of(config, parameters)

    def update_layer(self, adapter_name: str, config: AdapterConfig, inference_mode: bool = False) -> None:
        """Add the adapter ``adapter_name`` with fresh parameters, float32, on the device of the values."""
        parameters = self.new_parameters(config, self.shape)
        for name, parameter in zip(self.parameter_names(config), parameters, strict=True):
            trained = name in self.adapter_layer_names
            getattr(self, name)[adapter_name] = nn.Parameter(parameter.to(self.device), requires_grad=trained)
        self.adapter_options[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def device(self) -> torch.device:
        return self.base_layer.values.device

    @property
    def shape(self) -> WeightShape:
        base = self.base_layer
        return WeightShape(self.out_features, self.in_features, base.pattern, base.values.numel())

    def compressed(self) -> Weight:
        """The base layer's weight as the adapters see it: the values before any merge."""
        base = self.base_layer
        if base.values.is_meta:
            raise UserError("an adapter needs its base weights in memory; load the model without offloading")
        if self._blocks is None:
            weight = Weight.of(base.values, base.metadata, base.pattern, self.out_features, self.in_features)
            self._blocks = weight.blocks
        values = self._unmerged.get("weight_values", base.values).to(base.values.device)
        return Weight(values, base.metadata, base.pattern, self.out_features, self.in_features, self._blocks)

    def updates(self, adapter_names: list[str]) -> list[Update]:
        """The updates of those of ``adapter_names`` that this layer has."""
        return [
            self.update_of(self.adapter_options[name], self.parameters_of(name))
            for name in adapter_names
            if name in self.adapter_options
        ]

    def parameters_of(self, adapter_name: str) -> tuple[Tensor, ...]:
        """The parameters of one adapter in the order of ``parameter_names``."""
        names = self.parameter_names(self.adapter_options[adapter_name])
        return tuple(getattr(self, name)[adapter_name] for name in names)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.adapter_options]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        return self.adapted(x, active)

    def adapted(self, x: Tensor, active: list[str]) -> Tensor:
        """The layer's output with the adapters ``active``."""
        alone = [name for name in active if self._needs_branch(name)]
        together = self.updates([name for name in active if name not in alone])
        y = adapted_linear(x, self.compressed(), self.base_layer.bias, together) if together else self.base_layer(x)
        for name in alone:
            dropped = nn.functional.dropout(x, self.adapter_options[name].dropout, self.training)
            y = y + adapted_linear(dropped, self.compressed(), None, self.updates([name]), with_base=False)
        return y

    def _needs_branch(self, name: str) -> bool:
        options = self.adapter_options[name]
        return options.exact or (self.training and options.dropout > 0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective values into the base layer; the metadata is not touched.

        In float64 and rounded once, from the unmerged values and all merged adapters together, so the order of merges
        does not matter.
        ``safe_merge`` raises ``UserError`` for NaN or Inf and leaves the layer as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapter_options]
        if not names:
            return
        base, merged_adapters = self.base_layer, [*self.merged_adapters, *names]
        merged = self.merged_tensors(merged_adapters)
        if safe_merge and not all(bool(torch.isfinite(tensor).all()) for tensor in merged.values()):
            raise UserError(f"merging {', '.join(names)} gives NaN or Inf; the adapter seems to be broken")
        for name, tensor in merged.items():
            self._unmerged.setdefault(name, getattr(base, name).data)
            getattr(base, name).data = tensor
        self.merged_adapters = merged_adapters

    def merged_tensors(self, adapter_names: list[str]) -> dict[str, Tensor]:
        """What merging these adapters makes of the base layer's tensors, by name: from the unmerged ones."""
        return {"weight_values": merged_values(self.compressed(), self.updates(adapter_names))}

    def unmerge(self) -> None:
        """Put the base values back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, before in self._unmerged.items():
            tensor = getattr(self.base_layer, name)
            tensor.data = before.to(device=tensor.device, dtype=tensor.dtype)
        self._unmerged = {}
        self.merged_adapters = []


class SparseAdapterModel(ReplaceWithoutWeight, BaseTuner):
    """A PEFT tuner for ``SparseLinear``. Subclasses set ``name``, ``prefix``, ``config_cls``, ``tuner_layer_cls``."""

    name: ClassVar[str]
    config_cls: ClassVar[type[AdapterConfig]]
    tuner_layer_cls: type[AdapterLayer]
    # What a model card says of the mask.
    promise: ClassVar[str] = "It changes kept weights only: merging leaves the mask as it is."
    # The default learning rate of `sparse-rt finetune`.
    learning_rate: ClassVar[float]
    # Why the parameters cannot be split over processes (FSDP2), or None. An adapter with an optimizer or callbacks of
    # its own is refused anyway.
    sharding_refusal: ClassVar[str | None] = None
    target_module_mapping: dict[str, list[str]] = {}

    @classmethod
    def layer_class(cls, config: AdapterConfig, name: str) -> type[AdapterLayer]:
        """The class of the adapted layer ``name``, for an adapter that treats its layers differently."""
        return cls.tuner_layer_cls

    def continue_from_here(self, adapter_name: str) -> None:
        """Called when the adapter has got the parameters of an earlier one, which a run goes on from."""

    def training_parts(self, arguments) -> TrainingParts:
        """What a run with these ``TrainingArguments`` needs besides the parameters; called once they are trainable."""
        return TrainingParts()

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict) -> AdapterConfig:
        return peft_config  # targets are the compressed layers, whatever the architecture: see _prepare_model

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Choose the targets and refuse, before anything is replaced, what cannot be adapted."""
        names = [name.removesuffix(".base_layer") for name, _ in sparse_linears(model)]
        if not names:
            raise UserError(
                f"{type(self).__name__} adapts compressed layers and this model has none; "
                "convert it first with `sparse-rt convert`"
            )
        targets = peft_config.target_modules
        if targets is None:
            peft_config.target_modules = short_names(names, model)
        elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            head = _output_embedding_name(model)
            peft_config.target_modules = short_names([name for name in names if name != head], model)
        for name, module in model.named_modules():
            if ".base_layer" in name or not self._check_target_module_exists(peft_config, name):
                continue
            self._refuse_target(peft_config, name, module)

    def _refuse_target(self, config: AdapterConfig, name: str, module: nn.Module) -> None:
        layer = base_of(module)
        if not isinstance(layer, SparseLinear):
            if isinstance(module, BaseTunerLayer):
                raise UserError(f"{name} carries another kind of adapter ({type(module).__name__}); remove it first")
            raise UserError(
                f"{config.name} adapts compressed layers, {name} is a {type(layer).__name__}; leave target_modules "
                "out to adapt all compressed layers, or convert the model so that this layer is compressed"
            )
        if layer.wrapper is not None:
            raise UserError(
                f"{config.name} adapts kept values, and {name} is a product of three matrices (--method armor); "
                "convert the model with another --method, or adapt a dense model of it (`sparse-rt export --to dense`)"
            )
        kind = self.layer_class(config, name)
        reason = kind.refuse(config, layer.out_features, layer.in_features)
        reason = reason or kind.refuse_pattern(config, layer.pattern)
        if reason:
            raise UserError(f"{config.name} cannot adapt {name}: {reason}")

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AdapterLayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        layer = self.layer_class(peft_config, current_key)(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:  # an additional adapter is not trained until it is activated
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def base_of(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def short_names(names: list[str], model: nn.Module) -> set[str]:
    """The last parts of ``names`` where they mean the same modules: q_proj instead of one name a layer."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if meant == set(names) else set(names)


def _output_embedding_name(model: nn.Module) -> str | None:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)
