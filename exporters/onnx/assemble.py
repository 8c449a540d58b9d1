"""Turns a traced graph into ``model.onnx`` + ``model.onnx.data``: placeholders become operators, weights are attached.

Every weight is stored in the dtype and, where it is compressed, in the very bytes of the checkpoint; one tensor is in
memory at a time. Activations are float32, so a dense bfloat16 weight of the form "dense" is followed by a Cast.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from sparse_rt.checkpoint import WeightEntry
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import external, functions, operands
from sparse_rt.exporters.onnx.engine import MODEL_NAME
from sparse_rt.exporters.onnx.experts import Experts, branches
from sparse_rt.exporters.onnx.rows import JoinedCheckpoint
from sparse_rt.exporters.onnx.skeleton import PLACEHOLDER, Names, Weight
from sparse_rt.formats import VALUE_DTYPES, get_format

# Tables and larger initializers that tracing left in the graph (embeddings that a model reads itself, or of an unusual
# class) go back to their stored dtype.
_LARGE = 1 << 16

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
}


class Assembler:
    """Builds the final model of ``form`` ("function" or "dense") in ``folder``."""

    def __init__(
        self,
        folder: Path,
        proto: onnx.ModelProto,
        checkpoint: JoinedCheckpoint,
        names: Names,
        form: str,
        quantization: operands.Quantization | None = None,
    ):
        self.path, self.proto, self.checkpoint = folder / MODEL_NAME, proto, checkpoint
        self.names, self.form, self.quantization = names, form, quantization or operands.Quantization()
        self.data_path = folder / external.DATA_NAME
        self._stored: set[str] = set()
        self._uses: Counter[str] = Counter()
        self._casts: list[onnx.NodeProto] = []

    def build(self, weights: dict[str, Weight], experts: dict[str, Experts] | None = None) -> onnx.ModelProto:
        """Attach ``weights`` and ``experts``, by module name; writes the data file and returns the graph."""
        self._weights, self._experts = weights, experts or {}
        graph = self.proto.graph
        nodes: list[onnx.NodeProto] = []
        with self.data_path.open("wb") as self._data:
            for node in graph.node:
                if node.domain != functions.DOMAIN:
                    nodes.append(node)
                    continue
                module = node.attribute[0].s.decode()
                if node.op_type == PLACEHOLDER:
                    nodes += self._layer(module, node.input[0], node.output[0])
                else:
                    nodes += branches(node, self._experts[module], self._layer)
            self._move_initializers()
        del graph.node[:]
        graph.node.extend([*self._casts, *nodes])
        return self.proto

    def _layer(self, module: str, x: str, y: str) -> list[onnx.NodeProto]:
        weight = self._weights[module]
        self._uses[module] += 1
        # Layers that share all their weights (ALBERT) are one module, and a graph has no two nodes of one name.
        name = module if self._uses[module] == 1 else f"{module}.{self._uses[module]}"
        if weight.kind == "embedding":
            table, dtype = self._dense(weight)
            rows = y if dtype == torch.float32 else f"{name}.rows"
            gather = helper.make_node("Gather", [table, x], [rows], name=name, axis=0)
            return [gather] if rows == y else [gather, _to_float(rows, y)]
        if weight.kind == "sparse" and self.form != "dense":
            return [self._sparse(name, weight, x, y)]
        source, dtype = self._dense(weight)
        if self.form == "function":
            attributes = {"domain": functions.DOMAIN, "in_features": weight.columns}
            return [helper.make_node(functions.DENSE, [x, source], [y], name=name, **attributes)]
        wide, turned = source, f"{name}.weight_t"
        nodes = []
        if dtype != torch.float32:
            wide = f"{name}.weight_f32"
            nodes.append(_to_float(source, wide))
        nodes.append(helper.make_node("Transpose", [wide], [turned], name=f"{name}.transpose", perm=[1, 0]))
        return [*nodes, helper.make_node("MatMul", [x, turned], [y], name=name)]

    def _sparse(self, name: str, weight: Weight, x: str, y: str) -> onnx.NodeProto:
        key = self._weight_key(weight.owner)
        entry = self.checkpoint.weights[key]
        operator, attributes, names = operands.operator(entry, self.quantization)
        parts = [f"{weight.owner}.{part}" for part in names]
        if parts[0] not in self._stored:
            for part, tensor in zip(parts, operands.tensors(self.checkpoint, key, self.quantization), strict=True):
                self._store(part, tensor)
        node = helper.make_node(operator, [x, *parts], [y], name=name, domain=functions.DOMAIN, **attributes)
        for prop, value in (("pattern", entry.pattern), ("sparsity", f"{entry.sparsity:.6f}")):
            node.metadata_props.add(key=f"{functions.DOMAIN}.{prop}", value=value)
        return node

    def _dense(self, weight: Weight) -> tuple[str, torch.dtype]:
        """Name and stored dtype of a dense weight, stored once however many layers share it."""
        name = f"{weight.owner}.weight"
        if weight.kind == "sparse":
            key = self._weight_key(weight.owner)
            entry = self.checkpoint.weights[key]
            if name not in self._stored:
                fmt = get_format(entry.pattern)
                self._store(name, fmt.decompress(*self.checkpoint.load_weight(key), entry.m, entry.n))
            return name, entry.dtype
        key = self.names.key(name, self.checkpoint.tensors)
        if key is None:
            raise UserError(
                f"the checkpoint has no tensor {name}; ONNX cannot carry this architecture: use transformers or vLLM, "
                "or export --to dense"
            )
        dtype = self.checkpoint.tensors[key].dtype
        if dtype not in VALUE_DTYPES:
            raise UserError(
                f"{key} is {dtype}; the ONNX export takes {', '.join(map(str, VALUE_DTYPES))}: convert the model again "
                "with --dtype bfloat16"
            )
        if name not in self._stored:
            self._store(name, self.checkpoint.load(key))
        return name, dtype

    def entry_of(self, weight: Weight) -> WeightEntry:
        """The checkpoint's entry of a compressed weight."""
        return self.checkpoint.weights[self._weight_key(weight.owner)]

    def members_of(self, weight: Weight) -> list[str]:
        """The modules whose rows a compressed weight has."""
        return list(self.checkpoint.members(self._weight_key(weight.owner)))

    def _weight_key(self, module: str) -> str:
        key = self.names.key(module, self.checkpoint.weights)
        if key is None:
            raise UserError(f"module {module} is compressed, but the checkpoint has no compressed weight of that name")
        return key

    def _narrow(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` (loaded as float32) in the dtype it is stored in, where that loses nothing."""
        key = self.names.key(name, self.checkpoint.tensors)
        dtype = self.checkpoint.tensors[key].dtype if key else None
        if dtype not in (torch.bfloat16, torch.float16):
            return tensor
        narrow = tensor.to(dtype)
        return narrow if torch.equal(narrow.float(), tensor) else tensor

    def _move_initializers(self) -> None:
        """Large initializers of the traced graph join the data file, the others (norms, constants) stay in it."""
        graph = self.proto.graph
        for initializer in list(graph.initializer):
            if initializer.data_type != TensorProto.FLOAT or len(initializer.raw_data) < external.PAGE:
                continue
            tensor = torch.frombuffer(bytearray(initializer.raw_data), dtype=torch.float32)
            tensor = tensor.view(tuple(initializer.dims))
            name = initializer.name
            graph.initializer.remove(initializer)
            narrow = self._narrow(name, tensor) if tensor.dim() > 1 or tensor.numel() >= _LARGE else tensor
            if narrow.dtype == torch.float32:
                self._store(name, tensor)
            else:
                self._store(f"{name}.stored", narrow)
                self._casts.append(_to_float(f"{name}.stored", name))

    def _store(self, name: str, tensor: Tensor) -> None:
        """An initializer in the data file at the next page; less than a page stays in the graph."""
        raw = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
        proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=tensor.shape)
        self.proto.graph.initializer.append(external.store(proto, raw, self._data))
        self._stored.add(name)


def _to_float(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=TensorProto.FLOAT)
