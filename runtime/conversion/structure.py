"""Which tensors of a checkpoint are weights of ``nn.Linear``: asked from the model itself, built on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparse_rt.errors import UserError

# Kinds of checkpoint tensors. "experts" and "foreign" hold matrices that multiply activations, but no nn.Linear of
# the model owns them: transformers fuses experts into one 3-D parameter, and has transposed layers such as Conv1D.
# "unknown" is a matrix that no parameter is named after: renamed while loading, or not used by this model class.
LINEAR, TIED, EXPERTS, FOREIGN, UNKNOWN, OTHER = "linear", "tied", "experts", "foreign", "unknown", "other"


class Structure:
    """The empty model of a folder and what its parameters are.

    Checkpoints saved from the model without its head lack the prefix ("model."), and the reverse: names are matched
    with and without it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.prefix = getattr(model, "base_model_prefix", "")
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.linears = {name: module for name, module in self.modules.items() if isinstance(module, nn.Linear)}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = embedding is not None and head is not None and head.weight is embedding.weight
        self.tied_head = next((name for name, module in self.modules.items() if module is head), None) if tied else None
        self._embedding = next((name for name, module in self.modules.items() if module is embedding), None)
        self._fused = [p for name, p in self.parameters.items() if p.dim() > 2 and not self._is_convolution(name)]

    def _is_convolution(self, name: str) -> bool:
        return isinstance(self.modules[name.rpartition(".")[0]], nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def candidates(self, name: str) -> tuple[str, str, str]:
        """``name`` as it is, without and with the prefix of the base model."""
        return name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"

    def parameter_of(self, key: str) -> str | None:
        """The model's name of checkpoint tensor ``key``."""
        return next((name for name in self.candidates(key) if name in self.parameters), None)

    def module_of(self, key: str) -> str | None:
        """Name of the ``nn.Linear`` whose weight is ``key``, or None."""
        name = (self.parameter_of(key) or "").removesuffix(".weight")
        return name if name in self.linears and key.endswith(".weight") else None

    def kind(self, key: str, dim: int) -> str:
        """What checkpoint tensor ``key`` with ``dim`` dimensions is."""
        module = self.module_of(key)
        if module is not None:
            return TIED if module == self.tied_head else LINEAR
        name = self.parameter_of(key)
        if name is None:
            if dim < 2 or not (key.endswith(".weight") or self._fused):
                return OTHER
            return EXPERTS if self._fused else UNKNOWN
        if self.parameters[name].dim() > 2 and not self._is_convolution(name):
            return EXPERTS
        owner = self.modules[name.rpartition(".")[0]]
        matrix = dim == 2 and name.endswith(".weight") and not isinstance(owner, nn.Embedding)
        return FOREIGN if matrix else OTHER

    def owner(self, key: str) -> str:
        """Class name of the module that owns ``key``."""
        name = self.parameter_of(key)
        return type(self.modules[name.rpartition(".")[0]]).__name__ if name else "unknown"

    def key_of(self, parameter: str, keys) -> str | None:
        """The checkpoint key that holds ``parameter``; a tied embedding may be stored under either name."""
        names = [parameter]
        if self.tied_head and parameter == f"{self._embedding}.weight":
            names.append(f"{self.tied_head}.weight")
        if self.tied_head and parameter == f"{self.tied_head}.weight":
            names.append(f"{self._embedding}.weight")
        return next((key for name in names for key in self.candidates(name) if key in keys), None)


def read_structure(folder: str | Path) -> Structure:
    """Build the model that ``config.json`` describes without its weights.

    Raises ``UserError`` when transformers does not know the architecture or has no causal language model for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            return Structure(AutoModelForCausalLM.from_config(config))
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"transformers cannot build the causal language model of {folder} ({reason}); convert works on models that "
            "AutoModelForCausalLM loads"
        ) from error
