"""Mixtures of experts on compressed weights: a token goes through the few experts that a router chose for it.

    h = up_e x                          up_e (2 i, hidden): the rows of the gate, then those of the projection
    y = sum_k w_k  down_e (act(h_gate) * h_up)                                    e = ids[token, k], w = weights

The weights of all experts of a layer lie behind each other, in the order of their ids:

    experts          values and metadata of one tall weight, (experts * 2 i, hidden) and (experts * hidden, i)
    packed_experts   derived layouts (``packed``) in one uint8 tensor, expert e in bytes spans[e, 0] to spans[e, 1]

An id of -1 means an expert of another rank: nothing is added for it. Activations without "_no_mul" are gated as above;
with it ``up_e`` has i rows and y = down_e act(h). Between the products h and the activation are rounded to the dtype of
x, as in a model that runs them one after the other; the sum over experts is float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels import ops
from sparse_rt.kernels.backends import Call, select

_library = torch.library.Library("sparse_rt", "FRAGMENT")
_ROUTED = "Tensor x, Tensor weights, Tensor ids"
_library.define(
    f"experts({_ROUTED}, Tensor up_values, Tensor up_metadata, Tensor down_values, Tensor down_metadata, "
    "str up_pattern, str down_pattern, int experts, int intermediate, str activation) -> Tensor"
)
_library.define(
    f"packed_experts({_ROUTED}, Tensor up, Tensor up_spans, Tensor down, Tensor down_spans, "
    "int intermediate, str activation) -> Tensor"
)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
PLAIN = "_no_mul"
ACTIVATIONS = (*(name for name in _FUNCTIONS if name != "relu2"), *(f"{name}{PLAIN}" for name in _FUNCTIONS))


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up_values: Tensor,
    up_metadata: Tensor,
    down_values: Tensor,
    down_metadata: Tensor,
    up_pattern: str,
    down_pattern: str,
    experts: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    """x [tokens, hidden], weights float32 and ids integer [tokens, k] -> [tokens, hidden] in the dtype of x."""
    return torch.ops.sparse_rt.experts(
        *(x, weights, ids, up_values, up_metadata, down_values, down_metadata),
        *(up_pattern, down_pattern, experts, intermediate, activation),
    )


def packed_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor,
    up_spans: Tensor,
    down: Tensor,
    down_spans: Tensor,
    intermediate: int,
    activation: str,
) -> Tensor:
    """As ``experts``; spans int64 [experts, 2] on the CPU, x in the dtype of the packed values."""
    return torch.ops.sparse_rt.packed_experts(x, weights, ids, up, up_spans, down, down_spans, intermediate, activation)


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies a gate with a projection; ``UserError`` for an unknown one."""
    if activation not in ACTIVATIONS:
        raise UserError(f"experts with the activation {activation!r} are not supported; known are {ACTIVATIONS}")
    return not activation.endswith(PLAIN)


def activate(h: Tensor, activation: str) -> Tensor:
    """h [..., 2 i] -> [..., i], or [..., i] -> [..., i] without a gate; every step rounded to the dtype of h."""
    function = _FUNCTIONS[activation.removesuffix(PLAIN)]
    if not is_gated(activation):
        return function(h)
    gate, up = h.chunk(2, -1)
    return function(gate) * up


def _tokens_call(op: str, x: Tensor, pattern: str, intermediate: int, activation: str) -> Call:
    rows = intermediate * (2 if is_gated(activation) else 1)
    return Call(op, pattern, rows, x.shape[-1], x.shape[0], x.dtype, x.device.type)


def _run_experts(x, weights, ids, up_values, up_metadata, down_values, down_metadata, *how):
    up_pattern, _, _, intermediate, activation = how
    call = _tokens_call("experts", x, up_pattern, intermediate, activation)
    return select(call)(x, weights, ids, up_values, up_metadata, down_values, down_metadata, *how)


def _run_packed_experts(x, weights, ids, up, up_spans, down, down_spans, intermediate, activation):
    # The layout may come from a 2:4 weight or a bitmask; its own header says which.
    call = _tokens_call("packed_experts", x, "unstructured", intermediate, activation)
    return select(call)(x, weights, ids, up, up_spans, down, down_spans, intermediate, activation)


_library.impl("experts", _run_experts, "CompositeExplicitAutograd")
_library.impl("packed_experts", _run_packed_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_rt::experts", lib=_library)
def _(x, weights, ids, up_values, up_metadata, down_values, down_metadata, *how):
    ops.check_devices("experts", x, weights, ids, up_values, up_metadata, down_values, down_metadata)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("sparse_rt::packed_experts", lib=_library)
def _(x, weights, ids, up, up_spans, down, down_spans, intermediate, activation):
    ops.check_devices("packed_experts", x, weights, ids, up, down)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def grouped(ids: Tensor) -> dict[int, Tensor]:
    """Expert -> its assignments (positions in the flattened ids), if it has any; waits for the device."""
    flat = ids.flatten().tolist()
    found: dict[int, list[int]] = {}
    for position, expert in enumerate(flat):
        if expert >= 0:
            found.setdefault(expert, []).append(position)
    return {expert: torch.tensor(found[expert], device=ids.device) for expert in sorted(found)}


def add_experts(x: Tensor, weights: Tensor, ids: Tensor, up: Callable, down: Callable, activation: str) -> Tensor:
    """The sum over experts where ``up(e, x)`` and ``down(e, h)`` multiply with the weights of expert e."""
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    scales = weights.flatten().to(total.dtype)
    for expert, chosen in grouped(ids).items():
        token = chosen // ids.shape[-1]
        out = down(expert, activate(up(expert, x[token]), activation))
        total.index_add_(0, token, out.to(total.dtype) * scales[chosen, None])
    return total.to(x.dtype)
