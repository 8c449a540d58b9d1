"""The quantization method ``sparse_rt`` as vLLM sees it: which layers of a model run on compressed weights.

``config.json`` decides, the headers are checked against it: vLLM itself does not notice when a quantized model lacks
tensors, so everything that headers can tell is refused here, in the front process, with the tensor's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from sparse_rt.checkpoint import QUANT_METHOD
from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm import parallel
from sparse_rt.exporters.vllm.experts_method import SparseRTExpertsMethod
from sparse_rt.exporters.vllm.folders import CompressedTensorsFolder, DenseFolder, ServedFolder, open_description
from sparse_rt.exporters.vllm.linear_method import SparseRTLinearMethod
from sparse_rt.exporters.vllm.loading import StoredWeight

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only loggers below its own name


@register_quantization_config(QUANT_METHOD)
class SparseRTConfig(QuantizationConfig):
    """Chosen by config.json of a sparse-rt or compressed-tensors folder; no flag of ``vllm serve`` is needed.

    Without an argument, which is how vLLM makes it for ``--quantization sparse_rt`` on a dense folder: every linear
    weight is compressed while it is loaded.
    """

    def __init__(self, folder: ServedFolder | None = None):
        super().__init__()
        self.folder = folder or DenseFolder()
        self._folder_names: dict[str, str] = {}  # vLLM's module name -> name in the folder, where they differ
        self._heads: parallel.Heads | None = None
        self._checked_size = 1

    def __repr__(self) -> str:
        return f"SparseRTConfig({self.folder})"

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
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None):
        """Take the sparse folders of compressed-tensors, for which vLLM has no loader any more."""
        return QUANT_METHOD if CompressedTensorsFolder.describes(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseRTConfig:
        """Strict: ``FormatError`` for an unknown version, pattern or key."""
        return cls(open_description(config))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix=self.folder.renamed)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the headers of a local folder: missing, extra and truncated tensors raise ``FormatError``.

        A hub model is checked while it loads, tensor by tensor: its files may not be on this machine yet.
        """
        self._heads = parallel.heads_of(getattr(hf_config, "text_config", None) or hf_config)
        path = Path(model_name)
        if not path.is_dir() or not any(path.glob("*.safetensors")):
            return
        self.folder.read(path)
        self._folder_names = {name: name for name in self.folder.shapes}
        if self.folder.sparsities is not None:
            logger.info("sparse_rt: %d compressed weights in %s", len(self.folder.sparsities), path)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow the renamings of the model class, so that names of the folder find vLLM's layers."""
        self._check_parallel_size()
        for name in list(self._folder_names.values()):
            for renamed in hf_to_vllm_mapper.apply_list([name]):
                self._folder_names.setdefault(renamed, name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for compressed linear layers, heads and experts, vLLM's own for everything else."""
        self._check_parallel_size()
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            stored = self._head(self._folder_name(prefix))
            return SparseRTLinearMethod(prefix, [stored]) if stored else None
        if not isinstance(layer, LinearBase):
            return None
        stored = self._members(prefix)
        return SparseRTLinearMethod(prefix, stored) if stored else UnquantizedLinearMethod()

    def _head(self, name: str) -> StoredWeight | None:
        """A head without a weight of its own in the folder is tied to the embedding, whatever `ignore` says."""
        known = self.folder.sparsities is None or name in self.folder.sparsities
        return self.folder.weight(name) if known else None

    def _members(self, prefix: str) -> list[StoredWeight]:
        """The compressed weights that layer ``prefix`` joins, [] when all are dense; a mixture is refused."""
        parent, _, own = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(own, [own])
        names = [self._folder_name(f"{parent}.{part}" if parent else part) for part in parts]
        return self._all_or_none(names, f"vLLM joins {', '.join(names)} into the layer {prefix}")

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """Our method when the experts are compressed; None leaves them to vLLM."""
        projections = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
        names = {
            (expert, part): self._folder_name(f"{prefix}.{expert}.{part}")
            for expert in range(layer.moe_config.num_logical_experts)
            for part in projections
            if part is not None
        }
        stored = self._all_or_none(list(names.values()), f"vLLM keeps all experts of {prefix} in one layer")
        if not stored:
            return None
        return SparseRTExpertsMethod(prefix, layer, dict(zip(names, stored, strict=True)))

    def _all_or_none(self, names: list[str], why: str) -> list[StoredWeight]:
        weights = {name: self.folder.weight(name) for name in names}
        dense = [name for name, weight in weights.items() if weight is None]
        if not dense:
            return list(weights.values())  # type: ignore[arg-type]
        if len(dense) < len(names):
            shown = ", ".join(dense[:3]) + (f" and {len(dense) - 3} more" if len(dense) > 3 else "")
            raise UserError(
                f"sparse_rt: {why}, but {shown} {'is' if len(dense) == 1 else 'are'} stored dense (`ignore`); "
                "convert again with all of them ignored, or none"
            )
        return []

    def _folder_name(self, name: str) -> str:
        return self._folder_names.get(name, name)

    def _check_parallel_size(self) -> None:
        """Before vLLM builds a layer that it cannot share out, with the sizes that would work."""
        size = get_tensor_model_parallel_world_size() if model_parallel_is_initialized() else 1
        if size == self._checked_size:
            return
        problem = self.folder.parallel_refusal(self._heads, size, _shares_experts())
        if problem:
            raise UserError(f"sparse_rt: {problem}")
        self._checked_size = size


def _shares_experts() -> bool:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and config.parallel_config.enable_expert_parallel
