"""int8 values in transformers: widened weight by weight while the files are read, so that layers never hold scales.

transformers calls such a step a weight conversion. A layer's parameters are those of a plain folder from the start:
what is offloaded, sharded or counted by size sees no difference.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from sparse_rt.checkpoint import WeightEntry
from sparse_rt.errors import FormatError
from sparse_rt.formats import VALUES_NAME, get_format
from sparse_rt.formats.int8 import SCALES_NAME, widen


class Widening:
    """``weights``: module name -> (name in the checkpoint, its entry)."""

    def __init__(self, weights: dict[str, tuple[str, WeightEntry]]):
        self.weights = weights
        self.problem: FormatError | None = None

    def conversions(self) -> list[WeightConverter]:
        """The loader takes many tensors to one name: the values', which stands for that of the metadata as well."""
        names = sorted({get_format(entry.pattern).metadata_name for _, entry in self.weights.values()})
        sources = [_ending(suffix) for suffix in (VALUES_NAME, SCALES_NAME, *names)]
        return [WeightConverter(sources, f".{VALUES_NAME}", operations=[_Widen(self)])]

    def finish(self, model: nn.Module) -> None:
        """Raise what was found while reading; the model is saved as it is in memory, without a conversion back."""
        if self.problem is not None:
            raise self.problem
        used = getattr(model, "_weight_conversions", None)
        if used:
            model._weight_conversions = [one for one in used if not _widens(one)]


def _ending(suffix: str) -> str:
    """How the loader says that a name ends in ``suffix``."""
    return rf"\.{suffix}$"


def _widens(conversion) -> bool:
    return any(isinstance(operation, _Widen) for operation in getattr(conversion, "operations", ()))


class _Widen(ConversionOps):
    hf_quantizer = True  # where newer releases (5.24) find it, they do not cast scales to the dtype of the model

    def __init__(self, widening: Widening):
        self.widening = widening

    def __deepcopy__(self, memo) -> _Widen:
        return self  # the loader copies a conversion for every weight

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a model in memory has plain values")

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        """Tensors of one weight, by the end of their names -> its values and metadata as the layer holds them."""
        module = full_layer_name.removesuffix(f".{VALUES_NAME}")
        name, entry = self.widening.weights[module]
        fmt, shape = get_format(entry.pattern), (entry.m, entry.n)
        stored = (input_dict[_ending(suffix)][0] for suffix in (VALUES_NAME, SCALES_NAME, fmt.metadata_name))
        q, scales, metadata = stored
        try:
            values = widen(name, fmt, q, scales, metadata, *shape, entry.group_size, entry.dtype)
        except FormatError as error:
            # Raised here, the loader would wrap it into a report of its own; `finish` raises it as it is.
            self.widening.problem = self.widening.problem or error
            values = torch.zeros_like(q)
        dtype = model.get_submodule(module).weight_values.dtype
        return {f".{VALUES_NAME}": values.to(dtype), f".{fmt.metadata_name}": metadata}
