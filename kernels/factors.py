"""A weight times a factor of its row and one of its column group, in one pass over the compressed values (SPP).

    W'[i, j] = W[i, j] (1 + scale b[i] a[g(i), j])      a [groups, n], b [m], g(i) = i // (m / groups)

``apply`` forms the values of W', ``gradients`` those of a and b under y = x W'^T; both for the tensors that ``refusal``
accepts. There is no other implementation: whoever uses them has a slower way in plain torch.
"""

from __future__ import annotations

import os

from torch import Tensor

from sparse_rt.kernels.backends import FORCE_VARIABLE, Call
from sparse_rt.kernels.native import gradient
from sparse_rt.kernels.native import ops as native

apply = gradient.apply_factors
gradients = gradient.factors_grad


def refusal(pattern: str, m: int, n: int, *tensors: Tensor) -> str | None:
    """Why these kernels do not take a weight (m, n) with these values, inputs or results; None: they do."""
    forced = os.environ.get(FORCE_VARIABLE)
    if forced and forced != "native":
        return f"{FORCE_VARIABLE}={forced}"
    for tensor in tensors:
        reason = native.can_run(Call("values_grad", pattern, m, n, 0, tensor.dtype, tensor.device.type))
        if reason:
            return reason
    return None if gradient.can_run(*tensors) else "this processor has no tile kernels"
