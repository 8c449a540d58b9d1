"""Models of one operator of domain ``sparse_rt``, and sessions on them."""

import onnxruntime
import torch
from onnx import TensorProto, helper

import helpers
from sparse_rt.exporters.onnx import functions
from sparse_rt.formats import get_format
from sparse_rt.formats.packing import row_offsets

TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}


def initializer(name, tensor):
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = {torch.uint8: TensorProto.UINT8, torch.int32: TensorProto.INT32, **TYPES}[tensor.dtype]
    return helper.make_tensor(name, kind, tensor.shape, raw, raw=True)


def random_weight(m, n, pattern, **options):
    """As helpers.random_weight; "dense" keeps everything."""
    if pattern == "dense":
        return helpers.random_weight(m, n, "unstructured", sparsity=0.0, **options)
    return helpers.random_weight(m, n, pattern, **options)


def operator_tensors(weight, pattern):
    """The initializers of ``weight`` [m, n] by the operator's input names; pattern "dense": not compressed."""
    if pattern == "dense":
        return {"weight": weight}
    fmt = get_format(pattern)
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    if pattern == "2:4":
        return {"values": values, "meta": metadata}
    offsets = row_offsets(metadata)
    return {"values": values.flatten(), "mask": metadata, "row_offsets": offsets}


def operator_model(
    weight, pattern, body, x_type=TensorProto.FLOAT, rank=2, opset=23, whole_bytes=None, cast=False, tensors=None
):
    """A model of one operator holding ``weight`` [m, n]; with ``cast`` x and y outside are float32 whatever x_type is.

    ``tensors`` replace initializers; ``body`` None leaves the function out.
    """
    m, n = weight.shape
    found = operator_tensors(weight, pattern) | (tensors or {})
    name = functions.DENSE if pattern == "dense" else functions.operator_of(pattern)
    outside = TensorProto.FLOAT if cast else x_type
    inner = ("x_inner", "y_inner") if cast else ("x", "y")
    nodes = [helper.make_node(name, [inner[0], *found], [inner[1]], domain=functions.DOMAIN, in_features=n)]
    if cast:
        nodes.insert(0, helper.make_node("Cast", ["x"], ["x_inner"], to=x_type))
        nodes.append(helper.make_node("Cast", ["y_inner"], ["y"], to=TensorProto.FLOAT))
    lead = ["batch", "sequence", "more"][: rank - 1]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", outside, [*lead, n])],
        [helper.make_tensor_value_info("y", outside, [*lead, m])],
        [initializer(key, tensor) for key, tensor in found.items()],
    )
    whole = n % 8 == 0 if whole_bytes is None else whole_bytes
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, functions.VERSION)],
        functions=[functions.function(name, body, opset, whole)] if body else [],
        ir_version=10,
    )


def session(model, threads=1, prepare=None, **options):
    """On the CPU, from a ModelProto or the path of one; ``prepare`` sees the options first."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    for key, value in options.items():
        setattr(settings, key, value)
    if prepare:
        prepare(settings)
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
