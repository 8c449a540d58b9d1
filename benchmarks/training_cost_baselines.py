"""What training on a dense masked weight costs: the layers that adapters on compressed weights are compared with.

Plain torch, on any device and in any floating dtype. Each is made from the dense weight [m, n] with zeros where it is
pruned, maps x [..., n] to [..., m], and lists in ``trainables`` what an optimizer would update. A unit is one product
of the size of the layer (2 T m n operations); a layer whose input wants a gradient does, forward and backward:

    OfficialSPP    y = x W^T + s drop(x) (W (.) B A_rep)^T    6 units, about 102 bytes of elementwise traffic a weight
    DenseLoRA      y = x W^T + s (x A^T) B^T                  2 units and six products of rank r
    MaskedDense    y = x W^T, gradient of W where it is kept  3 units

The sparse layers they stand beside: SPP 3 units (route F: y, dX, dY^T X tile by tile, never written), MaskLoRA and
trained values 3, DCFT 2. ``gradients`` runs one such step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class OfficialSPP(nn.Module):
    """The computation of the SPP authors' layer (github Lucky-Lance/SPP, peft/src/peft/tuners/lora.py).

    dW[i, j] = s B[i] A[g(i), j] W[i, j] with A [groups, n] and B [m, 1] in float32, groups of m / groups rows in order;
    the defaults are theirs: 16 groups, s = 16 / 8, dropout 0.05 before the adapter's product alone. Step by step:

        base       x W^T                                                                            1 unit
        adapter    repeat_interleave(A), times B, times W: three m x n of float32; rounded to the
                   dtype of x (their autocast does it), a fourth; then the product                  1
        backward   the adapter again, its product included (a reentrant checkpoint), dY^T drop(x) as a dense m x n,
                   four elementwise passes over m x n from it to dB and dA, dX of both products     1 + 1 + 2

    The dropout is outside of the checkpoint, so no state of a random generator is kept for the second time (they keep
    it); this spares the baseline a wait for the device. A reentrant checkpoint takes ``backward``, not
    ``torch.autograd.grad``: see ``gradients``.
    """

    units = 6

    def __init__(self, weight: Tensor, groups: int = 16, scale: float = 2.0, dropout: float = 0.05):
        super().__init__()
        m, n = weight.shape
        if groups < 1 or m % groups:
            raise ValueError(f"{m} rows cannot be cut into {groups} equal groups")
        self.groups, self.scale, self.dropout = groups, scale, dropout
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        bound = 1 / math.sqrt(n)
        self.a = nn.Parameter(torch.empty(groups, n, dtype=wide, device=weight.device).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(m, 1, dtype=wide, device=weight.device))

    @property
    def trainables(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight)
        # A copy of x that the checkpoint keeps; what is recomputed starts from it.
        dropped = F.dropout(x, self.dropout, self.training)
        update = checkpoint(self.adapter, dropped, self.a, self.b, use_reentrant=True, preserve_rng_state=False)
        return base + update * self.scale

    def adapter(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        update = torch.repeat_interleave(a, self.weight.shape[0] // self.groups, dim=0)
        update = update * b
        update = update * self.weight
        return F.linear(x, update.to(x.dtype))


class DenseLoRA(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685) on the frozen masked weight: A [r, n], B [m, r], s = alpha / r.

    A and B have ``dtype``, by default that of the weight, which is the cheaper choice. A merged LoRA is not sparse any
    more: it is here for its cost.
    """

    units = 2

    def __init__(self, weight: Tensor, rank: int = 8, alpha: float = 16.0, dtype: torch.dtype | None = None):
        super().__init__()
        m, n = weight.shape
        self.scale = alpha / rank
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        dtype = dtype or weight.dtype
        self.a = nn.Parameter(torch.empty(rank, n, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(m, rank, dtype=dtype, device=weight.device))

    @property
    def trainables(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
        return F.linear(x, self.weight) + (update * self.scale).to(x.dtype)


class MaskedDense(nn.Module):
    """Full fine-tuning that keeps the zeros: the weight is trained, its gradient multiplied by the mask.

    One bool a weight beside it. A gradient of zero leaves a weight of zero at zero under SGD and Adam(W), with weight
    decay too, so the forward pass needs no mask.
    """

    units = 3

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("mask", weight != 0)
        self.weight.register_hook(lambda gradient: gradient * self.mask)

    @property
    def trainables(self) -> list[nn.Parameter]:
        return [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """(dx, gradient of every trainable) of one forward and backward pass: x [..., n] wants a gradient, dy [..., m]."""
    leaves = [x, *layer.trainables]
    for leaf in leaves:
        leaf.grad = None
    layer(x).backward(dy)
    return tuple(leaf.grad for leaf in leaves)
