"""``from_pretrained`` of the Auto classes for sparse-rt folders: swaps ``nn.Linear`` for ``SparseLinear`` by header.

Importing this module registers it with transformers. Without it transformers stops with "no file named
model.safetensors", because the shards of a converted model carry names of their own: nothing loads random weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_rt.checkpoint import INDEX_NAME, QUANT_METHOD, Checkpoint, SparseConfig, read_header, sparse_header
from sparse_rt.checkpoint.header import METADATA_KEY
from sparse_rt.errors import FormatError, UserError
from sparse_rt.families import CheckpointNames, SplitExperts, empty_model, split_experts
from sparse_rt.families.names import saved_names
from sparse_rt.formats import VALUES_NAME
from sparse_rt.formats import wrapper as wrappers
from sparse_rt.formats.int8 import INT8
from sparse_rt.hf.widen import Widening
from sparse_rt.nn import SparseLinear, sparse_linears


class SparseRTConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers sees it; the checked model behind it is ``SparseConfig``.

    ``sparse`` describes the folder that is read; what is written is a model in memory, whose values are plain.
    """

    def __init__(self, **fields):
        fields.pop("dequantize", None)
        self.sparse = SparseConfig.from_dict({"quant_method": QUANT_METHOD, **fields})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict:
        return self.sparse.plain().to_dict()

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def get_loading_attributes(self) -> dict:
        return {}


class SparseRTQuantizer(HfQuantizer):
    """Loads, saves and dequantizes sparse-rt models; compressing a dense model is ``sparse-rt convert``."""

    requires_calibration = True
    widening: Widening | None = None  # of a folder with int8 values, while it is read
    splits_experts = False
    dtypes: Mapping[str, torch.dtype] = {}  # of the parameters, as the model was built

    def update_attn_implementation(self, config):
        """Folders written by save_pretrained carry the standard names, converted ones their own.

        A hook that sees the config before the weight files are resolved; releases up to 5.17 do not call it.
        """
        source = getattr(config, "_name_or_path", "")
        if source and cached_file(source, INDEX_NAME, _raise_exceptions_for_missing_entries=False) is not None:
            config.transformers_weights = INDEX_NAME
        return config

    update_tp_plan = update_attn_implementation  # called up to 5.19

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise FormatError("a sparse-rt model is loaded from safetensors files; none were found")
        headers = [read_header(file) for file in checkpoint_files]
        config = {"quantization_config": self.quantization_config.sparse.to_dict()}
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent, headers, config)
        swapped, new = swap_modules(model, checkpoint)
        if new:  # a folder that this model is saved to says that they are dense
            sparse = self.quantization_config.sparse
            self.quantization_config.sparse = sparse.model_copy(update={"ignore": [*sparse.ignore, *new]})
        self.splits_experts = any(isinstance(module, SplitExperts) for module in model.modules())
        self.dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        if checkpoint.quantization.values == INT8:
            self.widening = Widening({name: (key, checkpoint.weights[key]) for name, key in swapped.items()})
        return model

    def update_weight_conversions(self, weight_conversions, model=None):
        """Tensors of experts that are layers of their own are not joined while loading, nor taken apart for saving."""
        if self.splits_experts:
            weight_conversions = [one for one in weight_conversions if not isinstance(one, WeightConverter)]
        return weight_conversions + self.get_weight_conversions()

    def get_weight_conversions(self):
        return [] if self.widening is None else self.widening.conversions()

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.widening is not None:
            self.widening.finish(model)
            self.widening = None
        self._cast(model)
        # The loader wraps every floating tensor as a trainable parameter, whatever the module declared.
        for name, module in sparse_linears(model):
            module.weight_values.requires_grad_(False)
            module.metadata.requires_grad_(False)
            for matrix in module.wrapper or ():
                matrix.requires_grad_(False)
            if module.wrapper is not None and not any(matrix.is_meta for matrix in module.wrapper):
                wrappers.check_data(name, module.wrapper)
            if not module.weight_values.is_meta and not module.metadata.is_meta:
                module.format.check_data(name, module.values, module.metadata, module.out_features, module.in_features)
        return model

    def _cast(self, model) -> None:
        """Tensors that the loader renames (a missing prefix, Mixtral's blocks) keep the dtype of the file."""
        kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, parameter in model.named_parameters():
            wanted = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and not parameter.is_meta and not any(re.search(one, name) for one in kept):
                parameter.data = parameter.data.to(wanted)

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(sparse_linears(model)):
            dense = module.to_dense()
            model.set_submodule(name, dense if dtype is None else dense.to(dtype))
        return model

    def get_state_dict_and_metadata(self, model):
        modules = dict(sparse_linears(model))
        saved = saved_names(model, [f"{name}.{VALUES_NAME}" for name in modules])
        weights = {}
        for name, module in modules.items():
            key = saved[f"{name}.{VALUES_NAME}"].removesuffix(f".{VALUES_NAME}")
            weights[key] = {"pattern": module.pattern, "shape": [module.out_features, module.in_features]}
            if module.wrapper is not None:
                weights[key]["wrapper"] = wrappers.BLOCK_DIAGONAL
        return None, {METADATA_KEY: sparse_header(weights)[METADATA_KEY]}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def swap_modules(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Replace every ``nn.Linear`` whose weight is compressed in ``checkpoint`` by an empty ``SparseLinear``.

    Returns the name that each replaced module has in the checkpoint, and the layers that it does not have. Raises
    ``FormatError`` when the checkpoint has a weight the model lacks, or lacks one that its config announces,
    ``UserError`` for compressed experts that transformers computes in a way of its own.
    """
    names = _names_with_experts(model, checkpoint)
    swapped: dict[str, str] = {}
    for key, entry in checkpoint.weights.items():
        name = (names.parameter(f"{key}.weight") or "").removesuffix(".weight")
        if not name:
            continue  # a head that this model class does not have; transformers reports unexpected keys itself
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != (entry.m, entry.n):
            raise FormatError(
                f"weight {key} is ({entry.m}, {entry.n}), the model has {linear} there; config and weights do not fit"
            )
        dtype = linear.weight.dtype
        layer = entry.n, entry.m, linear.bias is not None, entry.pattern, entry.nnz, dtype
        empty = SparseLinear.empty(*layer, blocks=entry.wrapper)
        if linear.bias is not None:
            empty.bias = linear.bias
        model.set_submodule(name, empty)
        _leave_alone(model, name)
        swapped[name] = key
    dense = (key for key in checkpoint.dense_tensors() if key.endswith(".weight"))
    return swapped, new_layers(model, {names.parameter(key): key.removesuffix(".weight") for key in dense}, checkpoint)


def _leave_alone(model: nn.Module, name: str) -> None:
    """Some blocks draw the weights of their layers themselves (ModernBERT), and would look for one in ``name``.

    There is none to draw: ``new_layers`` sees to that. Blocks with buffers fill those at this occasion, and what is
    a model has other parts to see to.
    """
    from transformers import PreTrainedModel  # transformers imports this module while it is imported itself

    parent = model.get_submodule(name.rpartition(".")[0])
    own = (*parent.parameters(recurse=False), *parent.buffers(recurse=False))
    if not own and not isinstance(parent, PreTrainedModel):
        parent._is_hf_initialized = True


def _names_with_experts(model: nn.Module, checkpoint: Checkpoint) -> CheckpointNames:
    """The names of ``model``, whose experts get layers of their own where weights of theirs are compressed."""
    names = CheckpointNames(model)
    compressed = [f"{name}.weight" for name in checkpoint.weights]
    joined = {key: parameter for parameter, parts in names.joined(compressed).items() for key in parts}
    if not joined:
        return names
    reasons = split_experts(model, names, checkpoint.dense_shapes())
    for key, parameter in joined.items():
        reason = reasons.get(parameter.rpartition(".")[0], "it is no parameter of experts")
        if reason is not None:
            raise UserError(
                f"weight {key.removesuffix('.weight')} is compressed, and transformers joins it with others to "
                f"{parameter}, which cannot be taken apart: {reason}; serve this model with vLLM, or make a dense one "
                "with `sparse-rt export --to dense`"
            )
    if not hasattr(HfQuantizer, "update_weight_conversions"):
        raise UserError("compressed experts need a newer transformers, which lets a format choose what is joined")
    return CheckpointNames(model)


def new_layers(model: nn.Module, dense: Mapping[str | None, str], checkpoint: Checkpoint) -> list[str]:
    """The linear layers of ``model`` that transformers will draw, because ``checkpoint`` is of a class without them.

    Those are a classifier or a pooler; everything else that config.json announces compressed must be so, else
    ``FormatError``. ``dense``: parameter -> name in the checkpoint, without ".weight".
    """
    new, known = [], None
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        key = dense.get(f"{name}.weight")
        patterns = [checkpoint.quantization.pattern_for(one) for one in {name, key or name}]
        if None in patterns:
            continue
        if key is None and known is None:
            known = _known_modules(model, checkpoint.folder)
        if key is None and name not in known:
            new.append(name)
            continue
        found = "convert the model again" if key is None else "only a dense weight is stored"
        raise FormatError(
            f"tensor {key or name}.weight_values is missing: config.json announces a {patterns[0]} weight, {found}"
        )
    return new


def _known_modules(model: nn.Module, folder: Path) -> set[str]:
    """What the class that ``folder`` was converted from calls its modules, with and without its base model's prefix."""
    own = model
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or [type(model).__name__]):
        with contextlib.suppress(UserError):  # transformers has no such class: then none of the layers counts as new
            own = empty_model(folder)
    prefix, names = f"{own.base_model_prefix}.", {name for name, _ in own.named_modules()}
    return names | {name.removeprefix(prefix) for name in names} | {prefix + name for name in names}


# Guarded: the module may be executed again after a failed import, and transformers refuses a second registration.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(SparseRTConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(SparseRTQuantizer)
