"""A model without its weights: those are attached to its graph afterwards, straight from the checkpoint.

It is built on the meta device, so no weight of a linear or embedding layer is ever in memory; buffers and the small
parameters (norms, biases) are real. Every linear and embedding layer becomes a module that owns no weight and traces
to one placeholder node ``sparse_rt.Weight(x) <module = name>``. Tracing ``torch.ops.sparse_rt.linear`` with a
translation table works too, but then every weight travels through torch.export and the graph optimizer as a float32
tensor: the optimizer transposes dense weights into unnamed copies, stores tied ones twice and merges equal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import UserError
from sparse_rt.optional import require

PLACEHOLDER = "Weight"


@dataclass(frozen=True)
class Weight:
    """The weight of one layer: ``owner`` is the module that the checkpoint has it under (tied layers share one)."""

    owner: str
    kind: Literal["sparse", "linear", "embedding"]
    rows: int
    columns: int


class _Linear(nn.Module):
    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.name, self.in_features, self.out_features = name, linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _placeholder(x, self.name, (*x.shape[:-1], self.out_features))
        return y if self.bias is None else y + self.bias


class _Embedding(nn.Embedding):
    """What the forward of a subclass calls in place of that of ``nn.Embedding``."""

    def forward(self, input: Tensor) -> Tensor:
        return _placeholder(input, self.name, (*input.shape, self.embedding_dim))


def _take_embedding(name: str, module: nn.Embedding, load: Callable[[], Tensor]) -> None:
    """Some subclasses multiply (Gemma) or compute positions first (OPT): they keep their class, and lose the table.

    ``load`` gives it back where a model reads it other than by calling the layer (DeBERTa's relative positions).
    """
    kind = type(module)
    module.__class__ = _Embedding if kind is nn.Embedding else type(kind.__name__, (kind, _Embedding), {})
    module.name, module.load_table = name, load
    del module._parameters["weight"]
    module.weight = torch.empty(module.num_embeddings, module.embedding_dim, device="meta")  # they look at its dtype


def _placeholder(x: Tensor, name: str, shape: tuple) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"sparse_rt::{PLACEHOLDER}", [x], {"module": name}, dtype=torch.float32, shape=shape, version=1
    )


@dataclass(frozen=True)
class Names:
    """What the checkpoint calls the modules and tensors of a model: with or without the base model's ``prefix``, or
    ``renamed`` as transformers renames them while loading (GPT-NeoX's embed_out is its lm_head).
    """

    prefix: str = "model"
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint) -> Names:
        """Of a model that still has all of its parameters, on any device."""
        from sparse_rt.families import CheckpointNames

        names, renamed = CheckpointNames(model), {}
        for key in checkpoint.tensors:
            renamed[names.parameter(key)] = key
        for key in checkpoint.weights:
            renamed[(names.parameter(f"{key}.weight") or "").removesuffix(".weight")] = key
        return cls(model.base_model_prefix, {name: key for name, key in renamed.items() if name and name != key})

    def key(self, name: str, known: Iterable[str]) -> str | None:
        """What the checkpoint, which knows ``known``, calls module or tensor ``name`` of the model."""
        return self._first(self.renamed.get(name, name), known)

    def owner(self, key: str, known: Iterable[str]) -> str | None:
        """What the model, or a file that names things like it, calls ``key`` of the checkpoint."""
        return self._first(next((name for name, other in self.renamed.items() if other == key), key), known)

    def _first(self, name: str, known: Iterable[str]) -> str | None:
        candidates = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((candidate for candidate in candidates if candidate in known), None)


def open_skeleton(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Weight], Names]:
    """The model of ``checkpoint`` with placeholders, in eval mode and float32, the weights they stand for by name,
    and how the checkpoint calls them.

    Raises ``UserError`` where transformers has no such language model, or the checkpoint lacks a tensor of it.
    """
    model = _empty_model(checkpoint)
    names = Names.of(model, checkpoint)
    weights = _take_weights(model, checkpoint, names)
    _check_coverage(checkpoint, weights)
    _fill(model, checkpoint, names)
    return model, weights, names


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    from transformers import AutoConfig

    from sparse_rt.families import auto_class

    accelerate = require("accelerate", extra="onnx")
    if checkpoint.config.get("is_encoder_decoder"):
        raise UserError(
            f"{checkpoint.folder} has an encoder and a decoder, and the ONNX export writes models of one of them; "
            "use transformers, or export --to dense"
        )
    if checkpoint.config.get("use_bidirectional_attention"):
        raise UserError(
            f"{checkpoint.folder} is a decoder that looks at the tokens that follow, too, and the ONNX export would "
            "write one that does not; use transformers, or export --to dense"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        del config.quantization_config
        # float32: buffers such as rotary frequencies are computed in the dtype of the model.
        with accelerate.init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        raise UserError(
            f"transformers cannot build the model of {checkpoint.folder} ({str(error).splitlines()[0]}); the export "
            "works on language models that the Auto classes of transformers load"
        ) from error
    model.tie_weights()
    _split_experts(model, checkpoint)
    return model.eval()


def _split_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the experts of a mixture linear layers of their own, as the checkpoint has them."""
    from sparse_rt.families import CheckpointNames, split_experts

    reasons = split_experts(model, CheckpointNames(model), checkpoint.dense_shapes())
    stuck = next((f"{name} cannot be taken apart ({reason})" for name, reason in reasons.items() if reason), None)
    fused = (name for name, parameter in model.named_parameters() if parameter.dim() == 3)
    if stuck is None and (parameter := next((name for name in fused if ".experts." in name), None)) is not None:
        stuck = f"{parameter.rpartition('.')[0]} are one tensor with three dimensions in the checkpoint"
    if stuck is not None:
        raise UserError(
            f"the experts {stuck}; ONNX cannot carry this architecture: use transformers or vLLM, or export --to dense"
        )


def _take_weights(model: nn.Module, checkpoint: Checkpoint, names: Names) -> dict[str, Weight]:
    """Make linear and embedding layers placeholders; subclasses of ``nn.Linear`` stay as they are."""
    weights: dict[str, Weight] = {}
    owners: dict[int, str] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for name, module in layers:  # a tied weight lies in the checkpoint under one of its names
        if names.key(f"{name}.weight", checkpoint.tensors):
            owners.setdefault(id(module.weight), name)
    for name, module in layers:
        owner = owners.get(id(module.weight), name)
        if isinstance(module, nn.Embedding):
            weights[name] = Weight(owner, "embedding", module.num_embeddings, module.embedding_dim)
            _take_embedding(name, module, partial(_table, checkpoint, names.key(f"{owner}.weight", checkpoint.tensors)))
        elif type(module) is nn.Linear:
            sparse = names.key(name, checkpoint.weights) is not None
            kind, owner = ("sparse", name) if sparse else ("linear", owner)
            weights[name] = Weight(owner, kind, module.out_features, module.in_features)
            model.set_submodule(name, _Linear(name, module))
    return weights


def _table(checkpoint: Checkpoint, key: str) -> Tensor:
    return checkpoint.load(key).float()


def _check_coverage(checkpoint: Checkpoint, weights: dict[str, Weight]) -> None:
    found = sum(weight.kind == "sparse" for weight in weights.values())
    if found != len(checkpoint.weights):
        raise UserError(
            f"the checkpoint has {len(checkpoint.weights)} compressed weights, the model has {found} of them as "
            "linear layers; ONNX cannot carry this architecture: use transformers or vLLM, or export --to dense"
        )


def _fill(model: nn.Module, checkpoint: Checkpoint, names: Names) -> None:
    """Load every parameter that is left, and the buffers that the checkpoint has."""
    keys: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (key := names.key(name, checkpoint.tensors)) is not None:
            keys.setdefault(id(parameter), key)  # a tied bias lies in the checkpoint under one of its names
    for module_name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{module_name}.{own}" if module_name else own
            key = keys.get(id(parameter))
            if key is None:
                raise UserError(
                    f"parameter {name} of {type(model).__name__} is not in the checkpoint under that name; ONNX cannot "
                    "carry this architecture: use transformers or vLLM, or export --to dense"
                )
            loaded = nn.Parameter(checkpoint.load(key).float(), requires_grad=False)
            if loaded.shape != parameter.shape:
                raise UserError(
                    f"{key} has shape {tuple(loaded.shape)}, {type(model).__name__} needs {tuple(parameter.shape)}; "
                    "config.json and weights do not fit, copy or convert the model again"
                )
            module._parameters[own] = loaded
        for own, buffer in module._buffers.items():
            name = f"{module_name}.{own}" if module_name else own
            key = names.key(name, checkpoint.tensors)
            if buffer is not None and key is not None:
                buffer.copy_(checkpoint.load(key))
