"""Models of one operator of domain ``sparse_rt``, and sessions on them."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

import helpers
from sparse_rt.config import ConvertOptions, ExportOptions
from sparse_rt.exporters.onnx import engine, functions, library
from sparse_rt.formats import get_format, int8
from sparse_rt.formats.packing import row_offsets
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export

ISAS = ("scalar", "avx2", "avx512")
TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}


def compressed(folder, family, pattern="2:4", ignore=("lm_head",), **overrides):
    """A tiny model of ``family``, converted by magnitude (unstructured: 60 %)."""
    dense = helpers.tiny_model(folder / "dense", family, **overrides)
    options = {"sparsity": 0.6} if pattern == "unstructured" else {}
    options |= dict(model=str(dense), output_dir=folder / "sparse", method="magnitude", pattern=pattern)
    convert(ConvertOptions.build(ignore=list(ignore), **options))
    return folder / "sparse"


def exported(source, output, **options):
    """The result of an export to ONNX that was checked."""
    given = dict(model=str(source), output_dir=output, to="onnx", check=True, options=options)
    return export(ExportOptions.build(**given))


def initializer(name, tensor):
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    whole = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.int32: TensorProto.INT32}
    kind = (whole | TYPES)[tensor.dtype]
    return helper.make_tensor(name, kind, tensor.shape, raw, raw=True)


def random_weight(m, n, pattern, **options):
    """As helpers.random_weight; "dense" keeps everything."""
    if pattern == "dense":
        return helpers.random_weight(m, n, "unstructured", sparsity=0.0, **options)
    if pattern.startswith("int8"):
        return helpers.random_weight(m, n, "unstructured", **options)
    return helpers.random_weight(m, n, pattern, **options)


def operator_tensors(weight, pattern):
    """The initializers of ``weight`` [m, n] by the operator's input names; pattern "dense": not compressed."""
    if pattern == "dense":
        return {"weight": weight}
    if pattern.startswith("int8"):
        return quantized_tensors(weight, group_size_of(pattern))
    fmt = get_format(pattern)
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    if pattern == "2:4":
        return {"values": values, "meta": metadata}
    offsets = row_offsets(metadata)
    return {"values": values.flatten(), "mask": metadata, "row_offsets": offsets}


def group_size_of(pattern):
    """ "int8" (a scale for each row), "int8 64", "int8 128", "int8 256"."""
    return int(pattern.split()[1]) if " " in pattern else None


def quantized_tensors(weight, group_size):
    fmt, (m, n) = get_format("unstructured"), weight.shape
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    values, scales = int8.quantize(fmt, values, metadata, m, n, group_size)
    offsets = row_offsets(metadata)
    return {"values": values, "mask": metadata, "row_offsets": offsets, "scales": scales}


def quantized_weight(tensors, m, n, group_size):
    """The weight [m, n] that the tensors stand for, in float64."""
    fmt = get_format("unstructured")
    values = fmt.decompress(tensors["values"].double(), tensors["mask"], m, n)
    return values * tensors["scales"].double().repeat_interleave(group_size or n, dim=1)[:, :n]


def operator_model(
    weight,
    pattern,
    body,
    x_type=TensorProto.FLOAT,
    rank=2,
    opset=23,
    whole_bytes=None,
    cast=False,
    tensors=None,
    accuracy_level=0,
):
    """A model of one operator holding ``weight`` [m, n]; with ``cast`` x and y outside are float32 whatever x_type is.

    ``tensors`` replace initializers; ``body`` None leaves the function out.
    """
    m, n = weight.shape
    found = operator_tensors(weight, pattern) | (tensors or {})
    attributes = {"in_features": n}
    if pattern.startswith("int8"):
        name = functions.QUANTIZED
        attributes |= {"group_size": group_size_of(pattern) or 0, "accuracy_level": accuracy_level}
    else:
        name = functions.DENSE if pattern == "dense" else functions.operator_of(pattern)
    outside = TensorProto.FLOAT if cast else x_type
    inner = ("x_inner", "y_inner") if cast else ("x", "y")
    nodes = [helper.make_node(name, [inner[0], *found], [inner[1]], domain=functions.DOMAIN, **attributes)]
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


def native(model, threads=1, **options):
    return session(model, threads, lambda settings: engine.register(settings, required=True), **options)


def counted(run):
    """The result of ``run()`` and how many calls of the library it made."""
    before = library.calls()
    return run(), library.calls() - before


def relative_error(y, expected):
    return np.abs(y - expected.numpy()).max() / max(1e-3, expected.abs().max().item())


def save(model, folder):
    """model.onnx with every initializer in a file of its own; returns the bytes of those files."""
    for tensor in model.graph.initializer:
        (folder / tensor.name).write_bytes(tensor.raw_data)
        place = {"location": tensor.name, "offset": "0", "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    onnx.save(model, folder / "model.onnx")
    return sum((folder / tensor.name).stat().st_size for tensor in model.graph.initializer)
