"""Mixtures of experts: one placeholder in the traced graph, and a branch for every expert in the finished one.

transformers loops over the experts that were chosen, which no graph can hold as it stands: their number depends on the
data. Here every expert is a branch of its own, taken when a token chose it, and inside it only these tokens are
multiplied. What stands between its two products is traced from the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx.functions import DOMAIN
from sparse_rt.exporters.onnx.trace import to_onnx
from sparse_rt.families import SplitExperts

PLACEHOLDER = "Experts"
DOWN = "down_proj"

# (module, input name, output name) -> the nodes of that linear layer.
Layer = Callable[[str, str, str], list[onnx.NodeProto]]


@dataclass(frozen=True)
class Experts:
    """The experts of one block. ``first`` and ``down``: for each expert the modules side by side in its first and in
    its second product; ``between``: the graph from what the first gives to what the second takes.
    """

    first: list[list[str]]
    down: list[list[str]]
    between: onnx.GraphProto


class _Experts(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inputs = [hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype)]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PLACEHOLDER}",
            inputs,
            {"module": self.name},
            dtype=hidden_states.dtype,
            shape=hidden_states.shape,
            version=1,
        )


class _Between(nn.Module):
    """What experts do between their products, as transformers' own grouped kernels ask them for it."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.model = experts

    def forward(self, x: Tensor) -> Tensor:
        return self.model._apply_gate(x) if self.model.has_gate else self.model.act_fn(x)


def take_experts(model: nn.Module, opset: int) -> dict[str, Experts]:
    """Make the experts of a skeleton placeholders; what they stand for, by the name of the module.

    Raises ``UserError`` for experts of a class that does not say what it does between its products.
    """
    found: dict[str, Experts] = {}
    traced: dict[tuple, onnx.GraphProto] = {}
    for name, module in [(name, one) for name, one in model.named_modules() if isinstance(one, SplitExperts)]:
        first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        if not hasattr(module, "_apply_gate") or module.split_layout.keys() != {first, DOWN}:
            raise UserError(
                f"the experts {name} ({type(module).__name__}) have {', '.join(module.split_layout)} and compute in a "
                "way of their own; ONNX cannot carry this architecture: use transformers or vLLM, or export --to dense"
            )
        layers = {
            part: [[f"{name}.{path}" for path in paths] for paths in module.split_layout[part]]
            for part in (first, DOWN)
        }
        width = sum(model.get_submodule(path).out_features for path in layers[first][0])
        kind = type(module), width, _settings(module)
        if kind not in traced:
            traced[kind] = _trace_between(module, width, opset)
        found[name] = Experts(layers[first], layers[DOWN], traced[kind])
        model.set_submodule(name, _Experts(name))
    return found


def _settings(module: nn.Module) -> tuple:
    """What the computation between the products may depend on; blocks of one class may have limits of their own."""
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return ("its tensors", id(module))
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return tuple(sorted(plain.items())), repr(getattr(module, "act_fn", None))


def _trace_between(module: nn.Module, width: int, opset: int) -> onnx.GraphProto:
    x = torch.zeros(3, width)
    return to_onnx(_Between(module).eval(), (x,), ["x"], ["y"], {"x": {0: "tokens"}}, opset).graph


def branches(node: onnx.NodeProto, experts: Experts, layer: Layer) -> Iterator[onnx.NodeProto]:
    """The nodes that take the place of placeholder ``node``.

    Inputs x [tokens, hidden], index [tokens, k] int64 (no expert twice for a token) and weights [tokens, k]; output
    [tokens, hidden], the weighted sum of what the chosen experts give.
    """
    (x, index, weights), (y,) = node.input, node.output
    name, count = node.attribute[0].s.decode(), len(experts.down)
    made = _Names(name)
    yield made("Constant", [], "experts", value=_numbers(range(count)))
    yield made("Constant", [], "last", value=_numbers([-1]))
    yield made("Constant", [], "first", value=_numbers([0]))
    yield made("Unsqueeze", [index, made.of("last")], "columns")
    yield made("Equal", [made.of("columns"), made.of("experts")], "choices")
    yield made("Cast", [made.of("choices")], "counted", to=TensorProto.INT32)
    yield made("Constant", [], "lines", value=_numbers([0, 1]))
    yield made("ReduceMax", [made.of("counted"), made.of("lines")], "most", keepdims=0)
    yield made("Cast", [made.of("most")], "used", to=TensorProto.BOOL)
    used = [made.of(f"used.{expert}") for expert in range(count)]
    yield helper.make_node("Split", [made.of("used")], used, name=made.of("split"), axis=0, num_outputs=count)
    yield made("Shape", [x], "shape")
    yield made("ConstantOfShape", [made.of("shape")], "zeros")
    total = made.of("zeros")
    for expert in range(count):
        after = y if expert == count - 1 else made.of(f"sum.{expert}")
        taken = _expert(expert, (x, index, weights), total, experts, layer, f"{name}.{expert}")
        passed = _Names(f"{name}.{expert}.not_chosen")
        skipped = helper.make_graph([passed("Identity", [total], "y")], "not_chosen", [], [_output(passed.of("y"))])
        chosen = {"then_branch": taken, "else_branch": skipped}
        yield helper.make_node("If", [used[expert]], [after], name=f"{name}.{expert}", **chosen)
        total = after


def _expert(
    expert: int, inputs: tuple[str, str, str], total: str, experts: Experts, layer: Layer, name: str
) -> onnx.GraphProto:
    """``total`` and the share of one expert in it."""
    x, index, weights = inputs
    made = _Names(name)
    nodes = [
        made("Constant", [], "number", value=_numbers([expert])),
        made("Constant", [], "last", value=_numbers([-1])),
        made("Equal", [index, made.of("number")], "is_chosen"),
        made("NonZero", [made.of("is_chosen")], "places_t"),
        made("Transpose", [made.of("places_t")], "places", perm=[1, 0]),  # of every token: row and column of index
        made("GatherND", [weights, made.of("places")], "flat_share"),
        made("Unsqueeze", [made.of("flat_share"), made.of("last")], "share"),
        made("Constant", [], "row", value=_numbers([0])),
        made("Gather", [made.of("places"), made.of("row")], "rows", axis=1),
        made("GatherND", [x, made.of("rows")], "x"),
    ]
    nodes += _product(experts.first[expert], made.of("x"), made.of("between_x"), made, layer)
    nodes += _inlined(experts.between, made.of("between_x"), made.of("between_y"), made.of("between"))
    nodes += _product(experts.down[expert], made.of("between_y"), made.of("y"), made, layer)
    nodes += [
        made("Mul", [made.of("y"), made.of("share")], "shared"),
        made("ScatterND", [total, made.of("rows"), made.of("shared")], "sum", reduction="add"),
    ]
    return helper.make_graph(nodes, "chosen", [], [_output(made.of("sum"))])


def _product(modules: list[str], x: str, y: str, made: _Names, layer: Layer) -> list[onnx.NodeProto]:
    """The outputs of ``modules`` side by side."""
    if len(modules) == 1:
        return layer(modules[0], x, y)
    parts = [f"{module}.y" for module in modules]
    nodes = [node for module, part in zip(modules, parts, strict=True) for node in layer(module, x, part)]
    return [*nodes, helper.make_node("Concat", parts, [y], name=f"{y}.concat", axis=-1)]


def _inlined(graph: onnx.GraphProto, x: str, y: str, prefix: str) -> Iterator[onnx.NodeProto]:
    """The nodes of ``graph`` from its one input to its one output, under names that begin with ``prefix``."""
    names = {"": "", graph.input[0].name: x, graph.output[0].name: y}

    def renamed(name: str) -> str:
        return names.get(name, f"{prefix}.{name}")

    for tensor in graph.initializer:
        value = onnx.TensorProto()
        value.CopyFrom(tensor)
        yield helper.make_node("Constant", [], [renamed(tensor.name)], name=f"{prefix}.{tensor.name}", value=value)
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}.{node.name}"
        copy.input[:], copy.output[:] = map(renamed, node.input), map(renamed, node.output)
        yield copy


class _Names:
    """Makes nodes whose name and output begin with ``prefix``."""

    def __init__(self, prefix: str):
        self.prefix = prefix

    def of(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    def __call__(self, operator: str, inputs: list[str], name: str, **attributes) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [self.of(name)], name=f"{self.of(name)}.node", **attributes)


def _numbers(values) -> onnx.TensorProto:
    values = list(values)
    return helper.make_tensor("value", TensorProto.INT64, [len(values)], values)


def _output(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
