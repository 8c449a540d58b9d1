"""``SparseLinear``: a linear layer whose weight is values + metadata; no dense copy of it stays.

In inference on a processor with native kernels, or on a GPU where a kernel that reads it was measured to be faster than
a dense product, a layer holds the derived layout of its weight *instead* of values and metadata
(``kernels/packed.py``): ``pack()`` exchanges them, by itself at the first call in eval mode without gradients. Whoever
asks for the canonical tensors (``values``, ``state_dict``, ``.to``, an adapter, training) gets them back, bit for bit,
and the layer is canonical again until the next such call. Several threads may do all this at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import check_finite, get_format, normalize_zeros
from sparse_rt.formats import wrapper as wrappers
from sparse_rt.formats.wrapper import Wrapper, apply_blocks
from sparse_rt.kernels import ops, packed
from sparse_rt.kernels.transposed import shards_models

PACK_VARIABLE = "SPARSE_RT_PACK"  # 0: stay on values and metadata (to compare)

# Held while a layer exchanges its tensors and while they are read: several threads may call one layer, and one that
# reads in between would see neither form. One for all layers: a lock in a layer could be neither copied nor pickled.
_exchange = threading.RLock()


def _renew_lock() -> None:
    # A lock that another thread held at fork() stays locked in the child for ever.
    global _exchange
    _exchange = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class SparseLinear(nn.Linear):
    """y = x W^T + b with W (out_features, in_features) compressed, or the core S of W = A S B (``formats/wrapper.py``).

    Values and metadata are frozen parameters, not buffers: FSDP2 then shards both bit for bit and accelerate's
    RAM-efficient loading works. It subclasses ``nn.Linear`` so that ``target_modules="all-linear"`` finds it, and has
    no ``weight``: code that needs the dense matrix calls ``decompress()``. A wrapper is two frozen parameters more;
    ``values``, ``metadata``, ``mask()`` and ``sparsity`` are those of the core then.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    _packed: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: str,
        values: Tensor,
        metadata: Tensor,
        bias: Tensor | None,
        wrapper: Wrapper | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format = get_format(pattern)
        self.format.check_header("weight", values.shape, metadata.shape, out_features, in_features)
        self.weight_values = nn.Parameter(values, requires_grad=False)
        self.register_parameter(self.format.metadata_name, nn.Parameter(metadata, requires_grad=False))
        if wrapper is not None:
            dtypes, shapes = [tensor.dtype for tensor in wrapper], [tensor.shape for tensor in wrapper]
            wrappers.check_header("weight", dtypes, shapes, out_features, in_features, values.dtype)
            for name, tensor in zip(wrappers.NAMES, wrapper, strict=True):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias)

    @classmethod
    def empty(
        cls, in_features, out_features, bias, pattern, num_values, dtype, device="meta", blocks=None
    ) -> SparseLinear:
        """A layer with uninitialised storage for ``num_values`` kept weights, to be filled by a loader.

        ``blocks`` (rows, columns) are the block sizes of a wrapper, None: it has none.
        """
        fmt = get_format(pattern)
        refusal = fmt.refuse_shape(out_features, in_features)
        if refusal:
            raise FormatError(f"a ({out_features}, {in_features}) weight cannot be {pattern}: {refusal}")
        values = torch.empty(fmt.values_shape(out_features, in_features, num_values), dtype=dtype, device=device)
        metadata = torch.empty(fmt.metadata_shape(out_features, in_features), dtype=torch.uint8, device=device)
        bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        wrapper = None
        if blocks is not None:
            shapes = wrappers.shapes(out_features, in_features, *blocks)
            wrapper = Wrapper(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))
        return cls(in_features, out_features, pattern, values, metadata, bias, wrapper)

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

    @property
    def wrapper(self) -> Wrapper | None:
        """The matrices around the core, None where the values are the weight itself."""
        if wrappers.OUT_NAME not in self._parameters:
            return None
        return Wrapper(*(self._parameters[name] for name in wrappers.NAMES))

    @property
    def is_packed(self) -> bool:
        """Whether the layer holds the derived layout instead of values and metadata."""
        return self._packed is not None

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the weight takes in memory now."""
        core = self._packed.nbytes if self.is_packed else self.values.nbytes + self.metadata.nbytes
        return core + (self.wrapper.nbytes if self.wrapper is not None else 0)

    def pack_refusal(self) -> str | None:
        """None when ``pack()`` works here, otherwise why not."""
        values, metadata = self._parameters["weight_values"], self._parameters[self.format.metadata_name]
        if os.environ.get(PACK_VARIABLE) == "0":
            return f"{PACK_VARIABLE}=0"
        if "_hf_hook" in self.__dict__:
            return "accelerate moves the tensors of this layer between devices"
        if values.requires_grad:
            return "the values are trained"
        if type(values.data) is not Tensor or type(metadata.data) is not Tensor:
            return f"the values are a {type(values.data).__name__}"
        if shards_models():
            return "FSDP2 puts the tensors of this process's models together for a call and takes them apart after it"
        shape = self.pattern, self.out_features, self.in_features
        return packed.refusal(*shape, values.dtype, values.device.type, self.sparsity)

    def pack(self) -> None:
        """Exchange values and metadata for the derived layout; ``UserError`` with the reason where there is none."""
        with _exchange:
            if self.is_packed:
                return
            reason = self.pack_refusal()
            if reason is not None:
                raise UserError(f"this {self.pattern} layer cannot be packed: {reason}")
            shape = self.pattern, self.out_features, self.in_features
            canonical = [self._parameters[name].data for name in self.format.tensor_names]
            self._packed = packed.pack(*canonical, *shape)
            packed.page_out(*canonical)
            for name in self.format.tensor_names:  # what remains says shape and dtype, to whoever counts parameters
                empty = self._parameters[name].to("meta")
                self._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def unpack(self) -> None:
        """Exchange the derived layout for values and metadata again."""
        with _exchange:
            if not self.is_packed:
                return
            with torch.inference_mode(False):
                tensors = packed.unpack(self._packed, self.pattern, self.out_features, self.in_features)
            self._packed = None
            for name, tensor in zip(self.format.tensor_names, tensors, strict=True):
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _packed_for(self, x: Tensor) -> Tensor | None:
        """The derived layout for this call, made if need be; None where it runs on values and metadata."""
        values = self._parameters["weight_values"]
        if self.training or x.dtype != values.dtype:
            return None
        held = self._packed
        if held is not None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return held if held is None or held.device == x.device else None
        if values.device != x.device:
            return None
        with _exchange:
            if not self.is_packed and self.pack_refusal() is None:
                self.pack()
            return self._packed

    def train(self, mode: bool = True):
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        with _exchange:
            self.unpack()
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with _exchange:
            self.unpack()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **options):
        with _exchange:
            self.unpack()
            super()._load_from_state_dict(*args, **options)

    def __getstate__(self):
        with _exchange:
            self.unpack()  # the derived layout belongs to this process and processor
            return {**self.__dict__, "_parameters": dict(self._parameters)}

    def __getattr__(self, name: str):
        if name.startswith("weight_") and not torch.compiler.is_compiling():
            with _exchange:
                if name in self.format.tensor_names:
                    self.unpack()
                return super().__getattr__(name)
        if name == "weight":  # a property could not say this: nn.Module turns its AttributeError into its own
            raise AttributeError(
                f"a {self.pattern} SparseLinear has no dense weight; use .values and .metadata, or .decompress(); "
                "to adapt it use sparse_rt.SPPConfig or sparse_rt.MaskLoRAConfig in place of LoRA and its relatives"
            )
        return super().__getattr__(name)

    @property
    def nnz(self) -> int:
        return self._parameters["weight_values"].numel()

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        wrapper = self.wrapper
        if wrapper is None:
            return self._product(input, self._parameters["bias"])
        output = apply_blocks(wrapper.out, self._product(apply_blocks(wrapper.inner, input), None))
        return output if self.bias is None else output + self.bias

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The product with values and metadata."""
        held = self._packed_for(input)
        if held is not None:
            return packed.packed_linear(input, held, bias, self.out_features, self.in_features)
        if self._packed is not None and torch.compiler.is_compiling():
            torch.compiler.disable(self.unpack)()  # tracing would see the placeholders
        shape = self.pattern, self.out_features, self.in_features
        return ops.linear(input, self.weight_values, self.metadata, bias, *shape)

    def mask(self) -> Tensor:
        """bool [out_features, in_features], True = kept."""
        return self.format.unpack_mask(self.metadata, self.out_features, self.in_features)

    def decompress(self) -> Tensor:
        """A new dense weight [out_features, in_features]; with a wrapper A S B, which has no zeros."""
        core = ops.decompress(self.weight_values, self.metadata, self.pattern, self.out_features, self.in_features)
        return core if self.wrapper is None else self.wrapper.dense(core)

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
        ) + ("" if self.wrapper is None else f", wrapper={wrappers.BLOCK_DIAGONAL}")


def sparse_linears(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Name and module of every ``SparseLinear`` of ``model``, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def pack_weights(model: nn.Module) -> int:
    """Give every ``SparseLinear`` its derived layout now, not at the first call; returns how many have one.

    For ``torch.compile``, which cannot do it on the way, and for servers whose first answer must not be slower.
    """
    layers = [module for _, module in sparse_linears(model)]
    for module in layers:
        if not module.is_packed and module.pack_refusal() is None:
            module.pack()
    return sum(module.is_packed for module in layers)
