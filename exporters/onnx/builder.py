"""The graph of onnxruntime-genai's model builder, without its weights.

The builder turns a torch model into the operators that ONNX Runtime has beside the standard (GroupQueryAttention with
one buffer for past and present keys, one product for q, k and v, SkipSimplifiedLayerNormalization). Here it sees
modules without weights, and where it would write a MatMul it writes the placeholder that ``trace`` writes: the weights
are attached afterwards, straight from the checkpoint, and are never dense in memory.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx.functions import DOMAIN, VERSION
from sparse_rt.exporters.onnx.rows import Groups, can_join
from sparse_rt.exporters.onnx.skeleton import PLACEHOLDER, Names, Weight
from sparse_rt.optional import require

# model_type of transformers -> class of the builder.
CLASSES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "QwenModel",
    "qwen3": "Qwen3Model",
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "phi3": "Phi3MiniModel",
}
# Rotary embeddings that are the same for every length of a text, so that one table holds them.
_ROPE = ("default", "linear", "llama3", "yarn")
# Sequences of a cache may be of any length; windows are kept by the attention operator, not by shorter caches, so that
# a loop over plain ONNX Runtime needs to know nothing about them.
_OPTIONS = {"windowed_kv_cache": False}


@dataclass
class _Rows:
    """Rows ``begin`` to ``end`` of a linear layer that the builder takes apart (qkv_proj and gate_up_proj of Phi-3)."""

    whole: nn.Module
    begin: int
    end: int

    @property
    def weight(self) -> Tensor:
        return self.whole.weight[self.begin : self.end]

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.begin : self.end]


class _Placeholders:
    """The methods of the builder's model classes that would read weights; goes in front of such a class."""

    source: nn.Module
    embedding_name: str
    can_join: Callable[[tuple[str, ...]], bool]
    groups: Groups

    def load_weights(self, input_path: str) -> nn.Module:
        return self.source

    def make_rope_init(self, config: Any) -> None:
        kind = config.rope_parameters["rope_type"]
        if kind not in _ROPE:
            raise NotImplementedError(f"its rotary embeddings are of type {kind}, known are {', '.join(_ROPE)}.")
        rotated = int(self.rope_attrs["partial_rotary_factor"] * self.head_size)
        if rotated % 16:
            raise NotImplementedError(f"it rotates {rotated} columns of a head, GroupQueryAttention multiples of 16.")

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[Tensor, Tensor]:
        # From the model itself: the builder's classes pass over scalings that they do not know.
        rotary = self.source.base_model.rotary_emb
        angles = torch.outer(torch.arange(self.context_length).float(), rotary.inv_freq.float())
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def make_embedding_lookup(self, embedding: Tensor, basename: str, lm_head: Any) -> str:
        output = f"{basename}/Gather/output_0"
        self._place(self.embedding_name, self.input_names["input_ids"], output, f"{basename}/Gather")
        return output

    def make_matmul(self, matmul: Any, basename: str, root_input: str, **options) -> str:
        output = "logits" if options.get("logits") else f"{basename}/output_0"
        shape = self.make_hidden_state_shape(last_dim=matmul.weight.shape[0])
        if isinstance(matmul, _Rows):
            whole = f"{basename.rpartition('/')[0].rpartition('/')[0]}/{matmul.whole.name.rpartition('.')[2]}/MatMul"
            self.make_matmul(matmul.whole, whole, root_input)
            ends = [f"/model/constants/INT64/[{number}]" for number in (matmul.begin, matmul.end, -1)]
            self.make_slice(basename, [f"{whole}/output_0", *ends], dtype=self.io_dtype, shape=shape)
        else:
            self._place(matmul.name, root_input, output, basename)
            self.make_value(output, self.io_dtype, shape=shape)
        return basename

    def make_packed_matmul(self, q_matmul, k_matmul, v_matmul, basename: str, root_input: str, **options) -> str:
        parts = (q_matmul, k_matmul, v_matmul)
        rows = sum(part.weight.shape[0] for part in parts)
        if all(isinstance(part, _Rows) for part in parts):
            return self.make_matmul(q_matmul.whole, basename, root_input)
        names = tuple(part.name for part in parts)
        shape = self.make_hidden_state_shape(last_dim=rows)
        if self.can_join(names):
            joined = f"{names[0].rpartition('.')[0]}.qkv_proj"
            self.groups[joined] = names
            self._place(joined, root_input, f"{basename}/output_0", basename)
            self.make_value(f"{basename}/output_0", self.io_dtype, shape=shape)
            return basename
        stem = basename.removesuffix("/qkv_proj/MatMul")
        products = [f"{stem}/{name.rpartition('.')[2]}/MatMul" for name in names]
        for part, product in zip(parts, products, strict=True):
            self.make_matmul(part, product, root_input)
        self.make_concat(basename, [f"{name}/output_0" for name in products], self.io_dtype, shape, axis=-1)
        return basename

    def make_attention_unpacked(self, layer_id: int, attention: nn.Module, root_input: str, **options) -> None:
        _split(attention, "qkv_proj", {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size})

    def make_mlp_unpacked(self, layer_id: int, mlp: nn.Module, root_input: str) -> None:
        _split(mlp, "gate_up_proj", {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size})

    def _place(self, module: str, x: str, y: str, name: str) -> None:
        self.make_node(PLACEHOLDER, [x], [y], name=name, domain=DOMAIN, module=module)


def _split(parent: nn.Module, name: str, sizes: dict[str, int]) -> None:
    whole, begin = getattr(parent, name, None), 0
    for part, size in sizes.items() if whole is not None else ():
        setattr(parent, part, _Rows(whole, begin, begin + size))
        begin += size


def build(
    model: nn.Module, weights: dict[str, Weight], checkpoint: Checkpoint, names: Names, limit: int
) -> tuple[Any, Groups]:
    """The graph (``onnx.ModelProto``) of a skeleton, and the modules it joined in one product.

    Inputs, outputs and activations are those of ``trace``, without position_ids. ``weights`` gets the joined modules
    (below ``limit`` entries each).
    Raises ``UserError`` for a model that the builder does not build.
    """
    embedding = _name_embedding(model)
    for name in weights:
        _give_shape(model.get_submodule(name))
    keys = {name: _key(name, checkpoint, names) for name in weights}
    with contextlib.redirect_stdout(io.StringIO()):  # the builder prints what it does
        builder = _new_builder(model.config, type(model).__name__)
        builder.source, builder.embedding_name, builder.groups = model, embedding, {}
        scale = getattr(model.get_input_embeddings(), "embed_scale", None)
        if scale is not None:
            builder.embed_attrs["scale"] = float(scale)  # the builder's own is rounded to two digits
        builder.can_join = lambda modules: can_join(checkpoint, [keys[name] for name in modules], limit)
        _translated(lambda: builder.make_model(""), model.config.model_type)
    for joined, modules in builder.groups.items():
        weights[joined] = _joined(joined, [weights[name] for name in modules])
    return _proto(builder), {joined: tuple(keys[name] for name in parts) for joined, parts in builder.groups.items()}


def _give_shape(module: nn.Module) -> None:
    """The builder asks linear placeholders for the shape and dtype of a weight that they do not have."""
    if hasattr(module, "out_features"):
        module.weight = torch.empty(module.out_features, module.in_features, device="meta")


def _name_embedding(model: nn.Module) -> str:
    """The name of the input embedding, which the builder knows by its class or by an attribute."""
    module = model.get_input_embeddings()
    object.__setattr__(model, "embedding", module)
    return next(name for name, other in model.named_modules() if other is module)


def _new_builder(config: Any, architecture: str) -> Any:
    """The builder of onnxruntime-genai for ``config``, float32 on the CPU."""
    require("onnxruntime_genai", extra="genai")
    module = require("onnxruntime_genai.models.builder", extra="genai")
    import onnx_ir

    base = getattr(module, CLASSES[config.model_type])
    missing = [name for name in vars(_Placeholders) if name.startswith("make_") and not hasattr(base, name)]
    if missing:
        raise UserError(
            f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')} has another model builder (without "
            f"{', '.join(missing)}); base=genai was made for 0.18, base=portable needs none"
        )
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        # Mistral and Phi-3 name no layers: all of them look no further back than the window.
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    kind = type("Builder", (_Placeholders, base), {})
    dtype = onnx_ir.DataType.FLOAT
    builder = _translated(lambda: kind(config, dtype, dtype, "cpu", "", dict(_OPTIONS)), config.model_type)
    # The builder leaves the size of a head open, for caches of integers.
    for shapes in (builder.input_shapes, builder.output_shapes):
        for name, shape in shapes.items():
            if name.endswith((".key", ".value")):
                shape[-1] = builder.head_size
    return builder


def _translated(call: Callable[[], Any], model_type: str) -> Any:
    """What the builder gives; its errors for a configuration that it does not know become a ``UserError``."""
    try:
        return call()
    except (NotImplementedError, AttributeError, KeyError, ValueError) as error:
        kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        reason = f"{kind}{error}".rstrip(".")
        raise UserError(
            f"the model builder of onnxruntime-genai does not build this {model_type} model ({reason}); "
            "use base=portable"
        ) from error


def _joined(name: str, parts: list[Weight]) -> Weight:
    return Weight(name, parts[0].kind, sum(part.rows for part in parts), parts[0].columns)


def _key(module: str, checkpoint: Checkpoint, names: Names) -> str | None:
    """What the checkpoint calls ``module``, compressed or not."""
    compressed = names.key(module, checkpoint.weights)
    dense = names.key(f"{module}.weight", checkpoint.tensors)
    return compressed or (dense and dense.removesuffix(".weight"))


def _proto(builder: Any) -> Any:
    import onnx_ir

    builder.model.graph.opset_imports[DOMAIN] = VERSION
    builder.model.graph.sort()
    return onnx_ir.to_proto(builder.model)
