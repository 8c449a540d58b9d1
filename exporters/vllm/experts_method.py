"""The experts of a mixture-of-experts block of vLLM, whose weights stay compressed.

``w13`` holds the gate and the projection of every expert of this rank, ``w2`` the way back; vLLM hands their tensors
over one by one, with the number of the expert.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts

from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.vllm.encodings import TENSOR_NAMES, UNSTRUCTURED
from sparse_rt.exporters.vllm.linear_method import average_sparsity, is_dummy, refuse_batch_invariance
from sparse_rt.exporters.vllm.loading import LayerWeight, StoredWeight, common_format, in_format
from sparse_rt.kernels import experts as kernels
from sparse_rt.kernels import packed

Stored = dict[tuple[int, str], StoredWeight]  # (expert, projection as the folder calls it) -> its weight
_MATRICES = ("w13", "w2")


class SparseRTExpertsMethod(FusedMoEMethodBase):
    """Run-time tensors of a layer: ``w13_weight_packed`` and ``w2_weight_packed``, all experts in one tensor each.

    Where this processor has no derived layout: the canonical values and metadata of all experts behind each other.
    """

    def __init__(self, name: str, layer: RoutedExperts, stored: Stored):
        super().__init__(layer.moe_config)
        self.name, self.stored, self.dummy = name, stored, False
        self.activation = layer.activation.value
        self._refuse_what_is_missing(layer)

    def _refuse_what_is_missing(self, layer: RoutedExperts) -> None:
        refuse_batch_invariance()
        problems = {
            f"their activation is {self.activation}": self.activation not in kernels.ACTIVATIONS,
            "they have biases": self.moe.has_bias,
            "their activation is clamped (swiglu_limit)": layer.swiglu_limit is not None,
            "LoRA is switched on, and vLLM's LoRA for experts needs dense ones": self.moe.is_lora_enabled,
            "tokens are exchanged between ranks (all2all: data parallelism with expert parallelism)": (
                self.moe.moe_parallel_config.use_all2all_kernels
            ),
        }
        for problem, found in problems.items():
            if found:
                raise UserError(
                    f"sparse_rt: the compressed experts of {self.name} cannot be served: {problem}; "
                    'export the model with --to dense, or convert it with --ignore "re:.*experts.*"'
                )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Register zero-element placeholders; ``UserError`` when the cut of this rank would split N:M groups."""
        self.dummy = is_dummy()
        self.hidden, self.intermediate = hidden_size, intermediate_size_per_partition
        first, second = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
        rows = {part: self.intermediate for part in (first, second) if part is not None}
        device = torch.empty(0).device
        layer.sparse_experts = {}
        for expert in range(self.moe.num_logical_experts):
            local = layer._map_global_expert_id_to_local_expert_id(expert)
            if local == -1:
                continue
            for matrix, parts, columns in (
                ("w13", rows, hidden_size),
                ("w2", {layer.ckpt_down_proj_name: hidden_size}, self.intermediate),
            ):
                shards = [self.stored[expert, part].shard(count) for part, count in parts.items()]
                weight = LayerWeight(f"{self.name}.{expert}.{matrix}", shards, columns, params_dtype, device)
                layer.sparse_experts[matrix, local] = weight
        self._register_placeholders(layer, params_dtype)

    def _register_placeholders(self, layer: RoutedExperts, dtype: torch.dtype) -> None:
        for matrix in _MATRICES:
            for suffix in TENSOR_NAMES:
                placeholder = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                placeholder.weight_loader = partial(load_expert, layer, matrix, suffix)
                layer.register_parameter(f"{matrix}_{suffix}", placeholder)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Join the experts, derive the layout that is multiplied with and drop the canonical tensors.

        ``FormatError`` names what was not loaded.
        """
        for matrix in _MATRICES:
            for suffix in TENSOR_NAMES:
                delattr(layer, f"{matrix}_{suffix}")
        count = len(layer.sparse_experts) // len(_MATRICES)
        weights = {matrix: [layer.sparse_experts[matrix, expert] for expert in range(count)] for matrix in _MATRICES}
        layer.sparse_experts = {}
        finished = {matrix: [self._finish(weight) for weight in weights[matrix]] for matrix in _MATRICES}
        layer.is_packed = all(_packing_refusal(weights[matrix], finished[matrix]) is None for matrix in _MATRICES)
        register = _register_packed if layer.is_packed else _register_canonical
        patterns = [register(layer, matrix, weights[matrix], finished[matrix]) for matrix in _MATRICES]
        layer.sparse_shape = (*patterns, count, self.intermediate, self.activation)

    def _finish(self, weight: LayerWeight) -> tuple[Tensor, Tensor]:
        if self.dummy:
            weight.fill(average_sparsity(self.stored.values()))
        return weight.finish()

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: object, **__: object
    ) -> Tensor:
        """x [tokens, hidden], routing [tokens, k] -> [tokens, hidden], the sum over the experts of this rank."""
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        routed = x, topk_weights, topk_ids
        *patterns, experts, intermediate, activation = layer.sparse_shape
        if layer.is_packed:
            operands = layer.w13_weight_packed, layer.w13_spans, layer.w2_weight_packed, layer.w2_spans
            return torch.ops.sparse_rt.packed_experts(*routed, *operands, intermediate, activation)
        operands = layer.w13_weight_packed, layer.w13_weight_metadata, layer.w2_weight_packed, layer.w2_weight_metadata
        return torch.ops.sparse_rt.experts(*routed, *operands, *patterns, experts, intermediate, activation)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None


def _packing_refusal(weights: list[LayerWeight], finished: list[tuple[Tensor, Tensor]]) -> str | None:
    """Why the experts cannot have the derived layout; None when they can."""
    if finished[0][0].device.type != "cpu":
        return "the layout of all experts together is for processors"
    reasons = (
        packed.refusal(weight.format.pattern, weight.m, weight.columns, values.dtype)
        for weight, (values, _) in zip(weights, finished, strict=True)
    )
    return next(filter(None, reasons), None)


def _register_packed(layer: RoutedExperts, matrix: str, weights: list[LayerWeight], finished: list) -> str:
    from sparse_rt.kernels.native.experts import join

    blobs = [packed.pack(*finished.pop(0), weight.format.pattern, weight.m, weight.columns) for weight in weights]
    joined, spans = join(blobs)
    layer.register_parameter(f"{matrix}_weight_packed", Parameter(joined, requires_grad=False))
    layer.register_buffer(f"{matrix}_spans", spans, persistent=False)
    return UNSTRUCTURED  # every blob says for itself what it is


def _register_canonical(layer: RoutedExperts, matrix: str, weights: list[LayerWeight], finished: list) -> str:
    fmt, m, n = common_format(weight.format for weight in weights), weights[0].m, weights[0].columns
    pieces = [
        (*in_format(fmt, weight.format, *tensors, m, n), m) for weight, tensors in zip(weights, finished, strict=True)
    ]
    values, metadata = fmt.concat_rows(pieces, n)
    layer.register_parameter(f"{matrix}_weight_packed", Parameter(values, requires_grad=False))
    layer.register_parameter(f"{matrix}_weight_metadata", Parameter(metadata, requires_grad=False))
    return fmt.pattern


def load_expert(
    layer: RoutedExperts,
    matrix: str,
    suffix: str,
    param: Parameter,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """vLLM's loader of an expert's tensor: ``shard_id`` is w1 (gate), w3 (projection) or w2 (back)."""
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local == -1:
        return False if return_success else None
    weight: LayerWeight = layer.sparse_experts.get((matrix, local))
    if weight is None:
        raise NotImplementedError(f"sparse_rt: the experts of {layer.layer_name} are loaded; start a new engine")
    rank, size = layer.moe_config.tp_rank, layer.moe_config.tp_size
    key = 1 if shard_id == "w3" else 0
    if key >= len(weight.shards):
        raise FormatError(f"sparse_rt: unexpected tensor {weight_name} of expert {expert_id} in {layer.layer_name}")
    cut = weight.by_columns(rank, size) if shard_id == "w2" else weight.by_rows(key, rank, size)
    weight.stage(suffix, loaded_weight, {key: cut})
    return True if return_success else None
