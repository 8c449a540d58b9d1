"""ONNX Runtime's own weight quantization of an exported dense model: MatMulNBits, one weight in memory at a time.

Its quantizer takes MatMuls whose second input is a constant of the file. In our dense form that is computed, by Cast
and Transpose of the stored weight, which ONNX Runtime folds at load; here the same is done weight by weight, and each
goes through ONNX Runtime's routine and to disk before the next one is read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper

from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import external
from sparse_rt.exporters.onnx.engine import MODEL_NAME
from sparse_rt.exporters.onnx.graph import all_nodes
from sparse_rt.optional import require

DOMAIN = "com.microsoft"
BLOCK_SIZE = 32
# Activations are quantized to int8, too: the fastest path of ONNX Runtime on a CPU.
ACCURACY_LEVEL = 4
DESCRIPTION = (
    f"MatMulNBits of ONNX Runtime, symmetric, blocks of {BLOCK_SIZE}, accuracy level {ACCURACY_LEVEL} (int8 "
    "activations), for every MatMul by a constant, the head included; not lossless"
)


def quantize(dense: Path, output: Path, bits: int) -> dict[str, Any]:
    """Write the model of ``dense`` (an export with form=dense) to ``output`` with ``bits``-bit weights."""
    proto = onnx.load(str(dense / MODEL_NAME), load_external_data=False)
    with (output / external.DATA_NAME).open("wb") as data:
        run = _Quantization(dense, {tensor.name: tensor for tensor in proto.graph.initializer}, data, bits)
        read = run.rewrite(proto.graph, {})
        tensors = run.tensors + [_moved(tensor, dense, data) for name, tensor in run.stored.items() if name in read]
    proto.graph.ClearField("initializer")
    proto.graph.initializer.extend(tensors)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    (output / MODEL_NAME).write_bytes(proto.SerializeToString())
    replaced = sum(node.domain == DOMAIN for node in all_nodes(proto.graph))
    return {"bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL, "quantized": replaced}


class _Quantization:
    """The graph of ``folder`` with ``stored`` initializers on its way to ``bits``-bit weights in ``data``."""

    def __init__(self, folder: Path, stored: dict[str, TensorProto], data: BinaryIO, bits: int):
        self.folder, self.stored, self.data, self.bits = folder, stored, data, bits
        self.tensors: list[TensorProto] = []

    def rewrite(self, graph: onnx.GraphProto, outside: dict[str, onnx.NodeProto]) -> set[str]:
        """Put MatMulNBits in place of every MatMul by a constant, in branches (experts) too; the names it still reads.

        ``outside``: which node makes a name that ``graph`` may take from around it.
        """
        producers = outside | {name: node for node in graph.node for name in node.output}
        nodes = []
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self.rewrite(attribute.g, producers)
            weight = self._constant(node.input[1], producers) if node.op_type == "MatMul" else None
            nodes.append(node if weight is None or weight.ndim != 2 else self._matmul_nbits(node, weight))
        nodes, read = _needed(nodes, [value.name for value in graph.output])
        graph.ClearField("node")
        graph.node.extend(nodes)
        return read

    def _matmul_nbits(self, node: onnx.NodeProto, weight: np.ndarray) -> onnx.NodeProto:
        parts = {f"{node.name}.{part}": array for part, array in quantized(weight, self.bits).items()}
        self.tensors += [_stored(name, array, self.data) for name, array in parts.items()]
        sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": self.bits}
        sizes |= {"block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}
        inputs = [node.input[0], *parts]
        return helper.make_node("MatMulNBits", inputs, node.output, name=node.name, domain=DOMAIN, **sizes)

    def _constant(self, name: str, producers: dict[str, onnx.NodeProto]) -> np.ndarray | None:
        """What ``name`` holds where that is a stored tensor or Cast to float32 and Transpose of one; otherwise None."""
        if name in self.stored:
            return external.read(self.stored[name], self.folder)
        node = producers.get(name)
        if node is None or node.op_type not in ("Cast", "Transpose"):
            return None
        found = self._constant(node.input[0], producers)
        if found is None:
            return None
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Transpose":
            return found.transpose(attributes.get("perm"))
        return found.astype(np.float32) if attributes["to"] == TensorProto.FLOAT else None


@contextlib.contextmanager
def _logging_as_it_is() -> Iterator[None]:
    """Importing the quantizer configures the root logger, and every library would report to the terminal from then."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def quantized(weight: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Codes and scales of ``weight`` [in, out] float32, by ONNX Runtime's routine."""
    try:
        with _logging_as_it_is():
            from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
    except ImportError as error:
        version = require("onnxruntime", extra="onnx").__version__
        raise UserError(
            f"ONNX Runtime {version} cannot quantize weights here ({error}); "
            'pip install -U "sparse-rt[onnx]", or give --no-quantized'
        ) from error
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits)
    codes, scales, _ = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return {"weight_codes": codes, "weight_scales": scales}


def _needed(nodes: list[onnx.NodeProto], outputs: list[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """``nodes`` without those that nothing reads (Cast and Transpose of a quantized weight), and what they read."""
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(_inputs(node))
    return kept[::-1], read


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:  # the body of a Loop or If reads names from outside
        for inner in attribute.g.node:
            yield from _inputs(inner)


def _moved(tensor: TensorProto, folder: Path, data: BinaryIO) -> TensorProto:
    """``tensor`` of the model in ``folder`` for the new data file; what lies in the graph stays there."""
    if not external_data_helper.uses_external_data(tensor):
        return tensor
    header = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return external.store(header, external.loaded(tensor, folder).raw_data, data)


def _stored(name: str, array: np.ndarray, data: BinaryIO) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return external.store(TensorProto(name=name, data_type=kind, dims=array.shape), array.tobytes(), data)
