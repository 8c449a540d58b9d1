"""A linear layer of vLLM whose weight stays compressed: how it is created, loaded, finished and applied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm.loading import LayerWeight, Shard
from sparse_rt.exporters.vllm.parameters import ForbiddenParameter, SparseParameter, layer_loader
from sparse_rt.formats import VALUES_NAME, get_format
from sparse_rt.kernels import packed


@dataclass(frozen=True)
class StoredWeight:
    """One compressed weight of the folder that a layer reads: its name, pattern and sparsity."""

    name: str
    pattern: str
    sparsity: float


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
        if envs.VLLM_BATCH_INVARIANT:
            raise UserError(
                "sparse_rt: VLLM_BATCH_INVARIANT is set, but compressed layers choose their kernel by the number of "
                "tokens; unset it, or serve the model exported with --to dense"
            )
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        shards = self._shards(output_partition_sizes)
        anchor = torch.empty(0, dtype=params_dtype)
        weight = LayerWeight(self.name, shards, input_size_per_partition, params_dtype, anchor.device)
        loader = layer_loader(layer, extra_weight_attrs["weight_loader"])
        suffixes = dict.fromkeys(s for shard in shards for s in get_format(shard.pattern).tensor_names)
        for suffix in (*suffixes, *({"weight_meta", "weight_bitmask"} - suffixes.keys())):
            data = anchor if suffix == VALUES_NAME else torch.empty(0, dtype=torch.uint8)
            placeholder = SparseParameter(data=data, weight_loader=loader, weight=weight, suffix=suffix)
            layer.register_parameter(suffix, placeholder)
        forbidden = ForbiddenParameter(data=torch.empty(0, dtype=params_dtype), layer_name=self.name)
        layer.register_parameter("weight", forbidden)
        layer.sparse_weight = weight

    def _shards(self, sizes: list[int]) -> list[Shard]:
        if len(sizes) == len(self.stored):
            return [Shard(w.name, w.pattern, rows) for w, rows in zip(self.stored, sizes, strict=True)]
        patterns = {weight.pattern for weight in self.stored}
        if len(patterns) > 1:
            raise UserError(
                f"sparse_rt: layer {self.name} joins {len(sizes)} parts from {len(self.stored)} stored weights of the "
                f"patterns {', '.join(sorted(patterns))}; convert them with one pattern"
            )
        # Joined in the folder already (Phi-3): every part lies in the same stored weight.
        name = self.stored[0].name if len(self.stored) == 1 else self.name
        return [Shard(name, self.stored[0].pattern, rows) for rows in sizes]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Join the shards, derive the layout that is multiplied with and drop the canonical tensors.

        ``FormatError`` names what was not loaded.
        """
        weight: LayerWeight = layer.sparse_weight
        if self.dummy:
            weight.fill(sum(w.sparsity for w in self.stored) / len(self.stored))
        values, metadata = weight.finish()
        self._remove_placeholders(layer)
        shape = weight.format.pattern, weight.m, weight.columns
        sparsity = 1 - values.numel() / (weight.m * weight.columns)
        reason = packed.refusal(*shape, values.dtype, values.device.type, sparsity)
        layer.sparse_shape, layer.is_packed = shape, reason is None
        if layer.is_packed:
            layer.weight_packed = Parameter(packed.pack(values, metadata, *shape), requires_grad=False)
            return
        layer.weight_packed = Parameter(values, requires_grad=False)
        layer.weight_metadata = Parameter(metadata, requires_grad=False)

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
