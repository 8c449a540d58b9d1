"""Where a model has the two matrices of a pair: module names, and what cannot be adapted there.

Known are the names of Llama, Mistral, Qwen2, Qwen3 and OPT in transformers. A model with fused projections (Phi-3) has
no query, key, value or up matrix of its own and is refused for those sides; the o and the down side work there.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparse_rt.adapters.base import AdapterLayer, base_of
from sparse_rt.adapters.dcft.layers import ColumnScale, QueryKeyNorm, QueryKeyRows, RowScale
from sparse_rt.errors import UserError

UNITS: dict[str, tuple[str, ...]] = {"qk": ("q", "k"), "vo": ("v", "o"), "ud": ("up", "down")}

# Last part of a module's name -> (unit, side, class of the adapted layer). fc1 is missing on purpose: the activation
# stands between its rows and the columns of fc2, and it commutes with no scale (ReLU: with positive ones only).
ROLES: dict[str, tuple[str, str, type[AdapterLayer]]] = {
    "q_proj": ("qk", "q", QueryKeyRows),
    "k_proj": ("qk", "k", QueryKeyRows),
    "q_norm": ("qk", "q", QueryKeyNorm),
    "k_norm": ("qk", "k", QueryKeyNorm),
    "v_proj": ("vo", "v", RowScale),
    "o_proj": ("vo", "o", ColumnScale),
    "out_proj": ("vo", "o", ColumnScale),
    "up_proj": ("ud", "up", RowScale),
    "down_proj": ("ud", "down", ColumnScale),
    "fc2": ("ud", "down", ColumnScale),
}
# Projections that hold several matrices: they have no rows of one matrix alone.
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "gate_up_proj")
# Their rotary embedding turns channels 2j and 2j + 1 together; rope_tied knows the halves j and j + head_dim / 2.
INTERLEAVED = ("codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium")


def targets(config, model: nn.Module) -> list[str]:
    """Full names of the modules that the units and sides of ``config`` mean; ``UserError`` for a unit without any."""
    modules = {name: base_of(module) for name, module in model.named_modules() if ".base_layer" not in name}
    found = []
    for unit in config.units:
        side = getattr(config, f"side_{unit}")
        last = [name for name, role in ROLES.items() if role[:2] == (unit, side)]
        names = [name for name in modules if name.rpartition(".")[2] in last]
        if unit == "qk":  # a norm behind the projection takes its place
            normed = {name.rpartition(".")[0] for name in names if name.endswith("_norm")}
            names = [name for name in names if name.endswith("_norm") or name.rpartition(".")[0] not in normed]
        if not names:
            raise UserError(_missing(unit, side, last, modules))
        if side == "up":
            _refuse_ungated(names, modules)
        found += names
    return found


def _missing(unit: str, side: str, last: list[str], modules: dict[str, nn.Module]) -> str:
    text = f"dcft looks for modules called {' or '.join(last)} for the {side} side of {unit}, and this model has none"
    shorts = {name.rpartition(".")[2] for name in modules}
    fused = [name for name in FUSED if name in shorts]
    if fused:
        text += f"; {', '.join(fused)} holds several matrices in one, which have no rows of their own"
    if "fc1" in shorts and side == "up":
        text += "; an activation stands between fc1 and fc2, through which no scale goes: take side_ud=down"
    elif any(ROLES[short][0] == unit for short in shorts & ROLES.keys()):
        (other,) = set(UNITS[unit]) - {side}
        text += f"; side_{unit}={other} works"
    return text


def _refuse_ungated(names: list[str], modules: dict[str, nn.Module]) -> None:
    for name in names:
        if f"{name.rpartition('.')[0]}.gate_proj" not in modules:
            raise UserError(
                f"the activation stands between {name} and the columns of the matrix behind it (there is no "
                "gate_proj), through which no scale goes; take side_ud=down"
            )


def layer_class(config, name: str) -> type[AdapterLayer]:
    """The class of the adapted module ``name``; ``UserError`` when no unit and side of ``config`` means it."""
    role = ROLES.get(name.rpartition(".")[2])
    if role is None or role[0] not in config.units or role[1] != getattr(config, f"side_{role[0]}"):
        chosen = ", ".join(f"{unit} ({getattr(config, f'side_{unit}')} side)" for unit in config.units)
        known = ", ".join(last for last, (unit, side, _) in ROLES.items() if (unit, side) in _chosen(config))
        raise UserError(f"dcft with the units {chosen} adapts {known}, not {name}; leave target_modules out")
    return role[2]


def _chosen(config) -> set[tuple[str, str]]:
    return {(unit, getattr(config, f"side_{unit}")) for unit in config.units}


def head_dim(model_config: dict) -> int:
    """Channels of an attention head."""
    found = model_config.get("head_dim")
    if found is None and model_config.get("hidden_size") and model_config.get("num_attention_heads"):
        found = model_config["hidden_size"] // model_config["num_attention_heads"]
    if not found:
        raise UserError("the model's config names no head_dim; give the option head_dim")
    return int(found)


def refuse_rotary(model: nn.Module, model_config: dict) -> None:
    """``UserError`` unless the model has a rotary embedding over whole heads in the half-split layout."""
    kind = model_config.get("model_type")
    rope = model_config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", model_config.get("partial_rotary_factor"))
    if not any("RotaryEmbedding" in type(module).__name__ for module in model.modules()):
        reason = "has no rotary embedding"
    elif kind in INTERLEAVED:
        reason = "turns neighbouring channels together, not those of the two halves of a head"
    elif partial not in (None, 1, 1.0):
        reason = f"turns only {partial} of the channels of a head"
    else:
        return
    raise UserError(f"rope_tied ties the channels that a rotary embedding turns together; this model ({kind}) {reason}")


def refuse_norm(norm: nn.Module) -> str | None:
    """Why scaling the weight (and bias) of ``norm`` is not the same as scaling its output, or None."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return f"a {type(norm).__name__} has no vector as its weight"
    if weight.is_meta:
        return None
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        doubled = copy.deepcopy(norm)
        for parameter in doubled.parameters(recurse=False):
            parameter.mul_(2)
        if not torch.equal(doubled(x), norm(x) * 2):  # a factor of two rounds nothing
            return (
                f"a {type(norm).__name__} does not scale its output by its weight; side_qk on the projection is exact"
            )
    return None
