"""Mixtures of experts whose experts are linear layers again, one for every tensor of the checkpoint.

transformers keeps the experts of a block in parameters with three dimensions, [experts, rows, n], and puts them
together while loading. Nothing that works on linear layers sees those: no pruner, no compressed layer, no adapter.
``split_experts`` gives such a module one ``nn.Linear`` an expert and projection in place of the fused parameters.

What the experts compute stays the family's own code: its plain forward reads ``self.gate_up_proj[expert]`` and hands it
to ``torch.nn.functional.linear``. Here that reads a stand-in, which answers with the expert's linear layers, side by
side where the fused parameter holds several.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.errors import SparseRTError
from sparse_rt.families.build import empty_model
from sparse_rt.families.names import CheckpointNames

# Fused parameter -> for every expert the linear layers (paths inside the module) whose rows it holds, in this order.
Layout = dict[str, list[list[str]]]


class _Weight:
    """Fused parameter ``[expert]``: the layers that multiply in its place."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x, weight, bias = (*args, *(kwargs[name] for name in ("input", "weight", "bias") if name in kwargs), None)[:3]
        if function is not nn.functional.linear or not isinstance(weight, cls):
            raise SparseRTError(f"experts with layers of their own are multiplied by F.linear alone, not by {function}")
        parts = [layer(x) for layer in weight.layers]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


class _Fused:
    """What a fused parameter was to the forward of the experts: something to index with an expert."""

    _is_hf_initialized = True  # there is nothing to draw, whatever transformers' `_init_weights` thinks

    def __init__(self, experts: nn.Module, paths: list[list[str]]):
        self.experts, self.paths = experts, paths

    def __getitem__(self, expert: int | Tensor) -> _Weight:
        return _Weight([self.experts.get_submodule(path) for path in self.paths[int(expert)]])


class SplitExperts:
    """Mixed into the class of an experts module: its forward expert by expert, on the layers of ``split_layout``."""

    split_layout: Layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self)._plain_forward(self, *args, **kwargs)

    def __reduce__(self):
        base, names = type(self)._split_from
        return _unpickled, (base, names), self.__dict__


@cache
def _split_class(base: type, names: tuple[str, ...]) -> type:
    def fused(name: str) -> property:
        return property(lambda self: _Fused(self, self.split_layout[name]))

    members = {name: fused(name) for name in names}
    # Below the decorators that choose a grouped kernel, which would read the fused parameters whole.
    members |= {"_plain_forward": inspect.unwrap(base.forward), "_split_from": (base, names)}
    return type(base.__name__, (SplitExperts, base), members)


def _unpickled(base: type, names: tuple[str, ...]) -> nn.Module:
    kind = _split_class(base, names)
    return kind.__new__(kind)


def split_experts(
    model: nn.Module, names: CheckpointNames, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str | None]:
    """Give the experts of ``model`` (on the meta device) linear layers of their own, where the checkpoint has them so.

    ``shapes`` are those of the checkpoint's tensors, compressed ones under the name of their dense weight. Returns
    {experts module: why it stayed fused, or None}. The names of ``model`` change: make a new ``CheckpointNames`` of it.
    """
    joined = names.joined(shapes)
    owners: dict[str, list[str]] = {}
    for parameter in joined:
        owners.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    reasons = {}
    for owner, parameters in owners.items():
        module = model.get_submodule(owner)
        if all(model.get_parameter(name).dim() == 3 for name in parameters):
            reasons[owner] = _split(module, owner, {name: joined[name] for name in parameters}, names, shapes)
    return reasons


def _split(
    module: nn.Module,
    owner: str,
    joined: Mapping[str, Mapping[str, str]],
    names: CheckpointNames,
    shapes: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Take the fused parameters ``joined`` of ``module``, called ``owner``, apart; or the reason why not."""
    left = {f"{owner}.{name}" for name, _ in module.named_parameters(recurse=False)} - joined.keys()
    if left:
        return f"it holds {min(left)} besides"
    layout: Layout = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for parameter, parts in joined.items():
        name = parameter.rpartition(".")[2]
        paths = {key: _path(names, key, owner) for key in parts}
        found = _layout(names, module.get_parameter(name), parameter, parts, paths, shapes)
        if found is None:
            return "its tensors are not the rows of one expert's matrix"
        layout[name] = found
        sizes |= {path: shapes[key] for key, path in paths.items()}
    if not _multiplies_by_linear(module, layout):
        return "its forward does not multiply expert by expert"
    like = next(module.parameters(recurse=False))
    for path, (m, n) in sizes.items():
        parent, _, last = path.rpartition(".")
        _branch(module, parent).add_module(last, _linear(m, n, like))
    for name in layout:
        del module._parameters[name]
    module.split_layout = layout
    module._is_hf_initialized = True
    module.__class__ = _split_class(type(module), tuple(layout))
    return None


def loaded_names(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What the model of ``folder`` calls each tensor of its checkpoint (``shapes``, see ``split_experts``)."""
    model = empty_model(folder)
    split_experts(model, CheckpointNames(model), shapes)
    names = CheckpointNames(model)
    return {key: names.target(key)[0] for key in shapes}


def _layout(
    names: CheckpointNames,
    fused: Tensor,
    parameter: str,
    parts: Mapping[str, str],
    paths: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[list[str]] | None:
    """For every expert the ``paths`` of the layers that make up its rows of ``fused``; None where it is not so.

    Found by letting transformers join stand-ins: columns of row numbers, then rows of column numbers.
    """
    experts, rows, n = fused.shape
    if any(path is None or len(shapes[key]) != 2 or shapes[key][1] != n for key, path in paths.items()):
        return None
    counts = [shapes[key][0] for key in parts]
    numbers = dict(zip(parts, torch.arange(sum(counts), device="cpu").split(counts), strict=True))
    starts = {int(part[0]): key for key, part in numbers.items()}
    column = torch.arange(n, device="cpu")
    try:
        joined = names.join(parameter, parts, lambda key: numbers[key][:, None])
        columns = names.join(parameter, parts, lambda key: column[None, :])
    except Exception:  # whatever an operation of another kind says to tensors of these shapes
        return None
    if joined.shape != (experts, rows, 1) or not bool((columns == column).all()):
        return None
    layout = []
    for expert in joined[..., 0]:
        layers, row = [], 0
        while row < rows:
            key = starts.get(int(expert[row]))
            if key is None or not torch.equal(expert[row : row + len(numbers[key])], numbers[key]):
                return None
            layers.append(paths[key])
            row += len(numbers[key])
        layout.append(layers)
    return layout


def _path(names: CheckpointNames, key: str, owner: str) -> str | None:
    """Path of the layer for ``key`` inside the module ``owner``."""
    name = names.renamed(key)
    candidates = (name, f"{names.prefix}.{name}", name.removeprefix(f"{names.prefix}."))
    inside = next((one for one in candidates if one.startswith(f"{owner}.")), None)
    if inside is None or not inside.endswith(".weight"):
        return None
    return inside.removeprefix(f"{owner}.").removesuffix(".weight")


class _Zeros:
    """A fused parameter [experts, rows, n] of zeros that notes which experts were multiplied by."""

    def __init__(self, fused: Tensor):
        self.shape, self.used = fused.shape, set()

    def __getitem__(self, expert: int | Tensor) -> _Weight:
        return _Weight([lambda x: self._multiply(x, int(expert))])

    def _multiply(self, x: Tensor, expert: int) -> Tensor:
        _, rows, n = self.shape
        if x.shape[-1] != n:
            raise ValueError(f"{x.shape[-1]} columns for a weight of {n}")
        self.used.add(expert)
        return x.new_zeros(*x.shape[:-1], rows)


def _multiplies_by_linear(module: nn.Module, parameters: Iterable[str]) -> bool:
    """Whether the plain forward of ``module`` reads its fused parameters through ``F.linear`` alone, tried on zeros."""
    forward = inspect.unwrap(type(module).forward)
    for n in {module.get_parameter(name).shape[2] for name in parameters}:
        zeros = {name: _Zeros(module.get_parameter(name)) for name in parameters}
        try:
            with torch.device("cpu"):  # the model may be under construction on another
                x, experts, weights = torch.zeros(2, n), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
                y = forward(_Probe(module, zeros), x, experts, weights)
        except Exception:  # another signature, another product, or inputs of another width
            continue
        if y.shape == x.shape and all(one.used == {0} for one in zeros.values()):
            return True
    return False


class _Probe:
    """``module`` with other things in place of its fused parameters."""

    def __init__(self, module: nn.Module, stand_ins: Mapping[str, Any]):
        self.__dict__.update(stand_ins, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _linear(m: int, n: int, like: Tensor) -> nn.Linear:
    """An ``nn.Linear`` on the meta device; drawing initial weights takes most of the time of making one."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = n, m
    empty = torch.empty(m, n, dtype=like.dtype, device="meta")
    linear.weight = nn.Parameter(empty, requires_grad=like.requires_grad)
    linear.register_parameter("bias", None)
    return linear


def _branch(module: nn.Module, path: str) -> nn.Module:
    """The submodule ``path``, made where it is missing."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    return module
