"""``quantization_config`` of a sparse-rt folder as vLLM sees it: which layers are compressed, and with which pattern.

``config.json`` decides, the headers are checked against it: vLLM itself does not notice when a quantized model lacks
tensors, so everything that headers can tell is refused here, in the front process, with the tensor's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from sparse_rt.checkpoint import QUANT_METHOD, Checkpoint, SparseConfig
from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.vllm.linear_method import SparseRTLinearMethod, StoredWeight
from sparse_rt.formats import get_format

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only loggers below its own name

# Sparsity of dummy weights when no header says it.
DEFAULT_SPARSITY = 0.5


@register_quantization_config(QUANT_METHOD)
class SparseRTConfig(QuantizationConfig):
    """Chosen by ``quant_method: sparse_rt`` in config.json; no flag of ``vllm serve`` is needed."""

    def __init__(self, sparse: SparseConfig | None = None):
        super().__init__()
        if sparse is None:
            raise UserError(
                "sparse_rt: --quantization sparse_rt needs a folder made by `sparse-rt convert`; "
                "such a folder selects the method by itself, without the flag"
            )
        self.sparse = sparse
        # Sparsity of every compressed weight by its name in the folder; None when the headers are not at hand.
        self.stored: dict[str, float] | None = None
        self._folder_names: dict[str, str] = {}  # vLLM's module name -> name in the folder, where they differ

    def __repr__(self) -> str:
        return f"SparseRTConfig(pattern={self.sparse.pattern!r}, ignore={self.sparse.ignore})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # vLLM's own floor: the portable path needs nothing newer

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseRTConfig:
        """Strict: ``FormatError`` for an unknown version, pattern or key."""
        return cls(SparseConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the headers of a local folder: missing, extra and truncated tensors raise ``FormatError``.

        A hub model is checked while it loads, tensor by tensor: its files may not be on this machine yet.
        """
        folder = Path(model_name)
        if not folder.is_dir() or not any(folder.glob("*.safetensors")):
            return
        checkpoint = Checkpoint.open(folder)
        self.stored = {name: weight.sparsity for name, weight in checkpoint.weights.items()}
        dense = [name.removesuffix(".weight") for name in checkpoint.dense_tensors() if name.endswith(".weight")]
        self._folder_names = {name: name for name in (*self.stored, *dense)}
        logger.info("sparse_rt: %d compressed weights in %s", len(self.stored), folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow the renamings of the model class, so that names of the folder find vLLM's layers."""
        for name in list(self._folder_names.values()):
            for renamed in hf_to_vllm_mapper.apply_list([name]):
                self._folder_names.setdefault(renamed, name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for compressed linear layers and heads, vLLM's own for everything else."""
        if isinstance(layer, RoutedExperts):
            self._refuse_experts(prefix)
        if isinstance(layer, ParallelLMHead):
            name = self._folder_name(prefix)
            known = self.stored is None or name in self.stored
            stored = self._weight(name) if known else None
            return SparseRTLinearMethod(prefix, [stored]) if stored else None
        if not isinstance(layer, LinearBase):
            return None
        stored = self._members(prefix)
        return SparseRTLinearMethod(prefix, stored) if stored else UnquantizedLinearMethod()

    def _members(self, prefix: str) -> list[StoredWeight]:
        """The compressed weights that layer ``prefix`` joins, [] when all are dense; a mixture is refused."""
        parent, _, own = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(own, [own])
        names = [self._folder_name(f"{parent}.{part}" if parent else part) for part in parts]
        weights = {name: self._weight(name) for name in names}
        dense = [name for name, weight in weights.items() if weight is None]
        compressed = [weight for weight in weights.values() if weight is not None]
        if dense and compressed:
            raise UserError(
                f"sparse_rt: vLLM joins {', '.join(names)} into the layer {prefix}, but `ignore` leaves "
                f"{', '.join(dense)} dense; convert again with all of them ignored, or none"
            )
        return compressed

    def _weight(self, name: str) -> StoredWeight | None:
        pattern = self.sparse.pattern_for(name)
        if pattern is None:
            return None
        default = get_format(pattern).default_sparsity or DEFAULT_SPARSITY
        return StoredWeight(name, pattern, (self.stored or {}).get(name, default))

    def _folder_name(self, name: str) -> str:
        return self._folder_names.get(name, name)

    def _refuse_experts(self, prefix: str) -> None:
        """vLLM keeps all experts of a block in one layer of its own kind, which has no compressed form here yet."""
        if self.stored is None:
            inside = self._weight(f"{prefix}.0.gate_proj") is not None
        else:
            inside = any(name.startswith(f"{self._folder_name(prefix)}.") for name in self.stored)
        if inside:
            raise FormatError(
                f"sparse_rt: the experts of {prefix} are compressed, which vLLM cannot serve yet; convert again with "
                '--ignore "re:.*experts.*"'
            )
