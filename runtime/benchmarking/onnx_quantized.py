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
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    tensors: list[TensorProto] = []
    with (output / external.DATA_NAME).open("wb") as data:
        for node in graph.node:
            weight = _constant(node.input[1], producers, stored, dense) if node.op_type == "MatMul" else None
            if weight is None or weight.ndim != 2:
                nodes.append(node)
                continue
            parts = {f"{node.name}.{part}": array for part, array in quantized(weight, bits).items()}
            tensors += [_stored(name, array, data) for name, array in parts.items()]
            nodes.append(_matmul_nbits(node, [*parts], weight.shape, bits))
        nodes, read = _needed(nodes, [value.name for value in graph.output])
        tensors += [_moved(tensor, dense, data) for name, tensor in stored.items() if name in read]
    for field, values in (("node", nodes), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    (output / MODEL_NAME).write_bytes(proto.SerializeToString())
    replaced = sum(node.domain == DOMAIN for node in nodes)
    return {"bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL, "quantized": replaced}


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


def _matmul_nbits(node: onnx.NodeProto, parts: list[str], shape: tuple[int, int], bits: int) -> onnx.NodeProto:
    sizes = {"K": shape[0], "N": shape[1], "bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}
    return helper.make_node("MatMulNBits", [node.input[0], *parts], node.output, name=node.name, domain=DOMAIN, **sizes)


def _constant(
    name: str, producers: dict[str, onnx.NodeProto], stored: dict[str, TensorProto], folder: Path
) -> np.ndarray | None:
    """What ``name`` holds where that is a stored tensor or Cast to float32 and Transpose of one; otherwise None."""
    if name in stored:
        return external.read(stored[name], folder)
    node = producers.get(name)
    if node is None or node.op_type not in ("Cast", "Transpose"):
        return None
    found = _constant(node.input[0], producers, stored, folder)
    if found is None:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Transpose":
        return found.transpose(attributes.get("perm"))
    return found.astype(np.float32) if attributes["to"] == TensorProto.FLOAT else None


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
