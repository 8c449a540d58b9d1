"""A linear layer of vLLM whose weight stays compressed: how it is created, loaded, finished and applied."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm.encodings import DENSE, DENSE_NAME, TENSOR_NAMES
from sparse_rt.exporters.vllm.loading import LayerWeight, Shard, StoredWeight
from sparse_rt.exporters.vllm.parameters import ForbiddenParameter, SparseParameter, layer_loader
from sparse_rt.formats import VALUES_NAME
from sparse_rt.kernels import packed

# A weight that is less sparse than this takes as much memory and time as a dense one: where the folder does not say
# what is sparse, it stays dense.
LEAST_SPARSITY = 0.15


def average_sparsity(stored: Iterable[StoredWeight]) -> float:
    return statistics.fmean(weight.sparsity for weight in stored)


def is_dummy() -> bool:
    """Whether the weights of the model that is being built are to be made up (``load_format=dummy``)."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def refuse_batch_invariance() -> None:
    if envs.VLLM_BATCH_INVARIANT:
        raise UserError(
            "sparse_rt: VLLM_BATCH_INVARIANT is set, but compressed layers choose their kernel by the number of "
            "tokens; unset it, or serve the model exported with --to dense"
        )


# vLLM chooses the loader with ranks and shards by the *name* of this class; a subclass needs the decorator again.
@register_weight_loader_v2_supported_method
class SparseRTLinearMethod(LinearMethodBase):
    """Run-time tensors of a layer: ``weight_packed`` alone, the derived layout of the processor.

    Where there is none: the canonical ``weight_packed`` (values) and ``weight_metadata``.

    The name ``weight_packed`` is one of the few by which vLLM's LoRA layers find the device of a quantized layer.
    """

    def __init__(self, name: str, stored: list[StoredWeight]):
        self.name, self.stored, self.dummy = name, stored, False

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Register zero-element placeholders; ``UserError`` when the cut of this rank would split N:M groups."""
        refuse_batch_invariance()
        self.dummy = is_dummy()
        shards = self._shards(output_partition_sizes)
        device = torch.empty(0).device
        weight = LayerWeight(self.name, shards, input_size_per_partition, params_dtype, device)
        loader = layer_loader(layer, extra_weight_attrs["weight_loader"])
        wanted = {suffix for shard in shards for suffix in shard.tensor_names}
        for suffix in TENSOR_NAMES:
            data = torch.empty(0, dtype=params_dtype if suffix in (VALUES_NAME, DENSE_NAME) else torch.uint8)
            if suffix == DENSE_NAME and suffix not in wanted:
                placeholder = ForbiddenParameter(data=data, layer_name=self.name, origin=shards[0].origin)
            else:
                placeholder = SparseParameter(data=data, weight_loader=loader, weight=weight, suffix=suffix)
            layer.register_parameter(suffix, placeholder)
        layer.sparse_weight = weight

    def _shards(self, sizes: list[int]) -> list[Shard]:
        if len(sizes) == len(self.stored):
            return [weight.shard(rows) for weight, rows in zip(self.stored, sizes, strict=True)]
        patterns = {weight.pattern for weight in self.stored}
        if len(patterns) > 1:
            raise UserError(
                f"sparse_rt: layer {self.name} joins {len(sizes)} parts from {len(self.stored)} stored weights of the "
                f"patterns {', '.join(sorted(patterns))}; convert them with one pattern"
            )
        # Joined in the folder already (Phi-3): every part lies in the same stored weight.
        joined = self.stored[0] if len(self.stored) == 1 else replace(self.stored[0], name=self.name)
        return [joined.shard(rows) for rows in sizes]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Join the shards, derive the layout that is multiplied with and drop the canonical tensors.

        ``FormatError`` names what was not loaded.
        """
        weight: LayerWeight = layer.sparse_weight
        if self.dummy:
            weight.fill(average_sparsity(self.stored))
        values, metadata = weight.finish()
        self._remove_placeholders(layer)
        shape = weight.format.pattern, weight.m, weight.columns
        sparsity = 1 - values.numel() / (weight.m * weight.columns)
        if sparsity < LEAST_SPARSITY and all(stored.encoding is DENSE for stored in self.stored):
            return self._stay_dense(layer, weight.format.decompress(values, metadata, *shape[1:]))
        reason = packed.refusal(*shape, values.dtype, values.device.type, sparsity)
        layer.sparse_shape, layer.is_packed = shape, reason is None
        if layer.is_packed:
            layer.weight_packed = Parameter(packed.pack(values, metadata, *shape), requires_grad=False)
            return
        layer.weight_packed = Parameter(values, requires_grad=False)
        layer.weight_metadata = Parameter(metadata, requires_grad=False)

    @staticmethod
    def _stay_dense(layer: torch.nn.Module, weight: Tensor) -> None:
        """What turned out not to be sparse runs as vLLM runs it without us."""
        is_head = isinstance(layer, ParallelLMHead)
        layer.quant_method = UnquantizedEmbeddingMethod() if is_head else UnquantizedLinearMethod()
        layer.weight = Parameter(weight, requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m]: one custom op, so that torch.compile and CUDA graphs see no Python of ours."""
        if layer.is_packed:
            return torch.ops.sparse_rt.packed_linear.default(x, layer.weight_packed, bias, *layer.sparse_shape[1:])
        return torch.ops.sparse_rt.linear(x, layer.weight_packed, layer.weight_metadata, bias, *layer.sparse_shape)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """A head that shares the (dense) embedding has no compressed weight of its own."""
        self._remove_placeholders(layer)
        layer.quant_method = UnquantizedEmbeddingMethod()
        layer.weight = embed_tokens.weight
        return layer

    @staticmethod
    def _remove_placeholders(layer: torch.nn.Module) -> None:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if isinstance(parameter, SparseParameter | ForbiddenParameter):
                delattr(layer, name)
