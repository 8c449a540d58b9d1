"""``SparseLinear``: a linear layer whose weight is values + metadata; no dense copy of it stays."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import check_finite, get_format, normalize_zeros
from sparse_rt.kernels import ops


class SparseLinear(nn.Linear):
    """y = x W^T + b with W (out_features, in_features) compressed.

    Values and metadata are frozen parameters, not buffers: FSDP2 then shards both bit for bit and accelerate's
    RAM-efficient loading works. It subclasses ``nn.Linear`` so that ``target_modules="all-linear"`` finds it, and has
    no ``weight``: code that needs the dense matrix calls ``decompress()``.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def __init__(
        self, in_features: int, out_features: int, pattern: str, values: Tensor, metadata: Tensor, bias: Tensor | None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format = get_format(pattern)
        self.format.check_header("weight", values.shape, metadata.shape, out_features, in_features)
        self.weight_values = nn.Parameter(values, requires_grad=False)
        self.register_parameter(self.format.metadata_name, nn.Parameter(metadata, requires_grad=False))
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias)

    @classmethod
    def empty(cls, in_features, out_features, bias, pattern, num_values, dtype, device="meta") -> SparseLinear:
        """A layer with uninitialised storage for ``num_values`` kept weights, to be filled by a loader."""
        fmt = get_format(pattern)
        refusal = fmt.refuse_shape(out_features, in_features)
        if refusal:
            raise FormatError(f"a ({out_features}, {in_features}) weight cannot be {pattern}: {refusal}")
        values = torch.empty(fmt.values_shape(out_features, in_features, num_values), dtype=dtype, device=device)
        metadata = torch.empty(fmt.metadata_shape(out_features, in_features), dtype=torch.uint8, device=device)
        bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return cls(in_features, out_features, pattern, values, metadata, bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: str, mask: Tensor | None = None) -> SparseLinear:
        """Compress ``linear``; without ``mask`` its weight must already obey the pattern.

        Raises ``FormatError`` for NaN or Inf, ``UserError`` when the shape cannot carry the pattern.
        """
        fmt = get_format(pattern)
        m, n = linear.weight.shape
        refusal = fmt.refuse_shape(m, n)
        if refusal:
            raise UserError(f"a ({m}, {n}) weight cannot be {pattern}: {refusal}")
        with torch.no_grad():
            check_finite("weight", linear.weight)
            weight = normalize_zeros(linear.weight.detach())
            values, metadata = fmt.compress(weight, fmt.mask_of(weight) if mask is None else mask)
        return cls(n, m, pattern, values, metadata, linear.bias)

    @property
    def pattern(self) -> str:
        return self.format.pattern

    @property
    def values(self) -> Tensor:
        return self.weight_values

    @property
    def metadata(self) -> Tensor:
        return getattr(self, self.format.metadata_name)

    def __getattr__(self, name: str):
        if name == "weight":  # a property could not say this: nn.Module turns its AttributeError into its own
            raise AttributeError(
                f"a {self.pattern} SparseLinear has no dense weight; use .values and .metadata, or .decompress(); "
                "to adapt it use sparse_rt.SPPConfig or sparse_rt.MaskLoRAConfig in place of LoRA and its relatives"
            )
        return super().__getattr__(name)

    @property
    def nnz(self) -> int:
        return self.weight_values.numel()

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(
            input, self.weight_values, self.metadata, self.bias, self.pattern, self.out_features, self.in_features
        )

    def mask(self) -> Tensor:
        """bool [out_features, in_features], True = kept."""
        return self.format.unpack_mask(self.metadata, self.out_features, self.in_features)

    def decompress(self) -> Tensor:
        """A new dense weight [out_features, in_features]."""
        return ops.decompress(self.weight_values, self.metadata, self.pattern, self.out_features, self.in_features)

    def to_dense(self) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the same weight and the same bias parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.decompress(), requires_grad=False)
        linear.bias = self.bias
        return linear

    def reset_parameters(self) -> None:
        """Nothing to draw: compressed weights come from a checkpoint or from ``from_dense``."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, sparsity={self.sparsity:.3f}"
        )


def sparse_linears(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Name and module of every ``SparseLinear`` of ``model``, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module
