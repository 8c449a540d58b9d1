"""Parameters that a layer shows to vLLM's loaders while the model is read.

They hold no data: the layer's own loader calls one of four ``load_*`` methods with the rank and the shard, and these
hand the tensor to the ``LayerWeight`` of the layer. So none of vLLM's sharding rules is repeated here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from sparse_rt.errors import FormatError
from sparse_rt.exporters.vllm.loading import Cut, LayerWeight

_QKV = {"q": 0, "k": 1, "v": 2}
ShardId = int | str | tuple[int, ...] | None


class SparseParameter(BasevLLMParameter):
    """Placeholder of the stored tensor ``suffix``; it must not refer to the layer, which vLLM's registry outlives."""

    def __init__(self, *, data: Tensor, weight_loader: Callable, weight: LayerWeight, suffix: str):
        super().__init__(data=data, weight_loader=weight_loader)
        self.sparse_weight, self.suffix = weight, suffix

    def stage(self, loaded_weight: Tensor, cuts: dict[int, Cut]) -> None:
        self.sparse_weight.stage(self.suffix, loaded_weight, cuts)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.stage(loaded_weight, {0: self.sparse_weight.by_rows(0, self.tp_rank, self.tp_size)})

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.stage(loaded_weight, {0: self.sparse_weight.by_columns(self.tp_rank, self.tp_size)})

    def load_merged_column_weight(self, loaded_weight: Tensor, shard_id: int, **_: Any) -> None:
        self.stage(loaded_weight, {shard_id: self._part(shard_id)})

    def load_qkv_weight(self, loaded_weight: Tensor, shard_id: str, num_heads: int = 1, **_: Any) -> None:
        self.stage(loaded_weight, {_QKV[shard_id]: self._part(_QKV[shard_id], num_heads if shard_id != "q" else 1)})

    def load_fused(self, loaded_weight: Tensor, shard_ids: tuple[int, ...], replicas: int) -> None:
        """One stored weight that holds several shards, such as the qkv_proj of Phi-3.

        ``replicas`` ranks share a KV head, so k and v of an attention layer have that many parts fewer.
        """
        parts = {key: self._part(key, replicas if key > 0 else 1) for key in shard_ids}
        self.stage(loaded_weight, parts)

    def _part(self, key: int, replicas: int = 1) -> Cut:
        return self.sparse_weight.by_rows(key, self.tp_rank // replicas, self.tp_size // replicas)


class ForbiddenParameter(BasevLLMParameter):
    """Stands where a dense layer has ``weight``: without it vLLM fails on such a tensor with an unrelated message."""

    def __init__(self, *, data: Tensor, layer_name: str, origin: str):
        super().__init__(data=data, weight_loader=self.refuse)
        self.layer_name, self.origin = layer_name, origin

    @staticmethod
    def refuse(param: ForbiddenParameter, loaded_weight: Tensor, *_: Any) -> None:
        raise FormatError(
            f"{param.origin}unexpected tensor {param.layer_name}.weight {tuple(loaded_weight.shape)}: config.json says "
            "that this layer is compressed; add the module to `ignore` of quantization_config, or convert it again"
        )


def layer_loader(layer: torch.nn.Module, weight_loader: Callable) -> Callable:
    """``weight_loader`` for the placeholders of ``layer``: its own, or ours where vLLM has none for ragged tensors."""
    if hasattr(layer, "shard_indices"):
        return vocabulary_loader(layer)
    if not hasattr(layer, "weight_loader_v2"):
        return load_whole
    if hasattr(layer, "output_sizes"):
        return joined_loader(layer, weight_loader)
    return weight_loader


def load_whole(param: SparseParameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
    """ReplicatedLinear: every rank keeps everything."""
    key = loaded_shard_id if isinstance(loaded_shard_id, int) else 0
    param.stage(loaded_weight, {key: param.sparse_weight.by_rows(key)})


def vocabulary_loader(layer: torch.nn.Module) -> Callable:
    """ParallelLMHead: this rank's tokens, padded with empty rows to a size that all ranks share."""
    tokens, stored = layer.shard_indices, layer.org_vocab_size

    def load_vocabulary(param: SparseParameter, loaded_weight: Tensor, *_: Any) -> None:
        rows = range(tokens.org_vocab_start_index, tokens.org_vocab_end_index)
        columns = param.sparse_weight.columns
        param.stage(loaded_weight, {0: Cut(stored, columns, rows, range(columns))})

    return load_vocabulary


def joined_loader(layer: torch.nn.Module, weight_loader: Callable) -> Callable:
    """Layers that join shards: vLLM's loader for single ones, ours for shards that are one tensor in the folder."""
    own = weakref.WeakMethod(weight_loader)
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    everything = tuple(range(len(layer.output_sizes)))

    def load_joined(param: SparseParameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        if loaded_shard_id is None or isinstance(loaded_shard_id, tuple):
            param.load_fused(loaded_weight, loaded_shard_id or everything, replicas)
        else:
            own()(param, loaded_weight, loaded_shard_id)

    return load_joined
