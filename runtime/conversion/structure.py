"""Which tensors of a checkpoint are weights of ``nn.Linear``: asked from the model itself, built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from sparse_rt.families import CheckpointNames, empty_model, split_experts

# Kinds of checkpoint tensors. "fused" and "foreign" hold matrices that multiply activations, but no nn.Linear of the
# model owns them: experts that cannot be taken apart (see families/experts.py), and transposed layers such as Conv1D.
# "unknown" is a matrix that no parameter is named after: not used by this model class.
LINEAR, TIED, FUSED, FOREIGN, UNKNOWN, OTHER = "linear", "tied", "fused", "foreign", "unknown", "other"


def _multiplies(module: nn.Module) -> bool:
    """Whether ``module``, on the meta device, is an ``nn.Linear`` that gives its product.

    Routers of experts may be a subclass that gives a choice (Phi-MoE).
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        y = module(module.weight.new_empty(2, module.in_features))
    except Exception:  # another signature, or a look at values that are not there: it stays dense and is reported so
        return False
    return isinstance(y, Tensor) and y.shape == (2, module.out_features)


class Structure:
    """The empty model of a checkpoint and what its parameters are; experts are linear layers of their own.

    ``shapes`` are those of the checkpoint's tensors, a compressed weight under the name of its dense one.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]):
        self.model = model
        self.fused = split_experts(model, CheckpointNames(model), shapes)  # experts -> why they stay in one tensor
        self.names = CheckpointNames(model)
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.linears = {name: module for name, module in self.modules.items() if _multiplies(module)}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = embedding is not None and head is not None and head.weight is embedding.weight
        self.tied_head = next((name for name, module in self.modules.items() if module is head), None) if tied else None
        self._embedding = embedding
        self._same: dict[int, list[str]] = {}  # names of one and the same parameter
        for name, parameter in self.parameters.items():
            self._same.setdefault(id(parameter), []).append(name)
        self._targets = {key: self.names.target(key) for key in shapes}
        self._keys = {name: key for key, (name, pattern) in self._targets.items() if pattern is None}
        self._joined = self.names.joined(key for key, (_, pattern) in self._targets.items() if pattern is not None)

    def _is_convolution(self, name: str) -> bool:
        return isinstance(self.modules[name.rpartition(".")[0]], nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def target(self, key: str) -> str:
        """The parameter that tensor ``key`` becomes or is joined into; a name of no parameter where it is not used."""
        return (self._targets.get(key) or self.names.target(key))[0]

    def parameter_of(self, key: str) -> str | None:
        """The model's name of checkpoint tensor ``key``, None when it is only a part of a parameter, or none."""
        name, pattern = self._targets.get(key) or self.names.target(key)
        return name if pattern is None and name in self.parameters else None

    def module_of(self, key: str) -> str | None:
        """Name of the ``nn.Linear`` whose weight is ``key``, or None."""
        name = (self.parameter_of(key) or "").removesuffix(".weight")
        return name if name in self.linears and key.endswith(".weight") else None

    def kind(self, key: str, dim: int) -> str:
        """What checkpoint tensor ``key`` with ``dim`` dimensions is."""
        module = self.module_of(key)
        if module is not None:
            return TIED if module == self.tied_head else LINEAR
        name = self.target(key)
        if name not in self.parameters:
            return UNKNOWN if dim == 2 and key.endswith(".weight") else OTHER
        joined = dim > 1 and self.parameter_of(key) is None
        if joined or (self.parameters[name].dim() > 2 and not self._is_convolution(name)):
            return FUSED
        owner = self.modules[name.rpartition(".")[0]]
        matrix = dim == 2 and name.endswith(".weight") and not isinstance(owner, nn.Embedding)
        return FOREIGN if matrix else OTHER

    def owner(self, key: str) -> str:
        """Class name of the module that owns ``key``."""
        name = self.parameter_of(key)
        return type(self.modules[name.rpartition(".")[0]]).__name__ if name else "unknown"

    def why_fused(self, key: str) -> str:
        """Why ``key``, of the kind "fused", is no linear weight."""
        name = self.target(key)
        if self.parameter_of(key) is not None:
            return "the experts are stored in one tensor with three dimensions"
        reason = self.fused.get(name.rpartition(".")[0]) or "only experts are taken apart"
        return f"transformers joins it with others to {name}: {reason}"

    def key_of(self, parameter: str) -> str | None:
        """The checkpoint key that holds ``parameter``; a tied one may be stored under any of its names."""
        names = [parameter, *self._same.get(id(self.parameters.get(parameter)), ())]
        return next((self._keys[name] for name in names if name in self._keys), None)

    @property
    def is_encoder(self) -> bool:
        """Whether the model gives no text: what is outside of its blocks are heads for a task, and poolers."""
        return not self.model.can_generate()

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence, None where nothing limits it."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if not isinstance(limit, int):
            return None
        tables = (m for m in self.modules.values() if isinstance(m, nn.Embedding) and m.num_embeddings == limit)
        # RoBERTa and its relatives count positions from behind the padding's.
        started = [m.padding_idx + 1 for m in tables if m.padding_idx is not None and m is not self._embedding]
        return limit - max(started, default=0)

    def has(self, parameter: str) -> bool:
        """Whether the checkpoint has what ``parameter`` is, or is put together from."""
        return parameter in self._joined or self.key_of(parameter) is not None

    def load(self, parameter: str, load: Callable[[str], Tensor]) -> Tensor:
        """``parameter`` from the checkpoint's tensors, each read with ``load(key)``."""
        key = self.key_of(parameter)
        return load(key) if key is not None else self.names.join(parameter, self._joined[parameter], load)


def read_structure(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    """Build the model that ``config.json`` describes without its weights, for a checkpoint with tensors of ``shapes``.

    Raises ``UserError`` when transformers does not know the architecture or has no language model for it.
    """
    return Structure(empty_model(folder), shapes)
