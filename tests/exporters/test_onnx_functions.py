"""The bodies of the two ONNX operators against torch: every pattern, width, dtype, in two engines."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import helpers
from sparse_rt.exporters.onnx import functions
from sparse_rt.formats import get_format
from sparse_rt.formats.packing import row_counts

TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}
# pattern, out_features, in_features: one byte or less, a byte and a bit, whole bytes, a rest; below, at and beyond one
# block of 64 rows.
SHAPES = [
    ("unstructured", 1, 1),
    ("unstructured", 64, 7),
    ("unstructured", 5, 8),
    ("unstructured", 130, 64),
    ("unstructured", 200, 100),
    ("2:4", 5, 4),
    ("2:4", 130, 12),
    ("2:4", 64, 64),
    ("2:4", 7, 100),
    ("4:8", 70, 8),
    ("4:8", 3, 64),
]


def initializer(name, tensor):
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = {torch.uint8: TensorProto.UINT8, torch.int32: TensorProto.INT32, **TYPES}[tensor.dtype]
    return helper.make_tensor(name, kind, tensor.shape, raw, raw=True)


def operator_model(weight, pattern, body, x_type=TensorProto.FLOAT, rank=2, opset=23, whole_bytes=None):
    """A model of one operator holding ``weight`` [m, n]."""
    fmt, (m, n) = get_format(pattern), weight.shape
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    tensors = {"values": values, "meta": metadata}
    if pattern != "2:4":
        offsets = torch.nn.functional.pad(row_counts(metadata).cumsum(0), (1, 0)).to(torch.int32)
        tensors = {"values": values.flatten(), "mask": metadata, "row_offsets": offsets}
    name = functions.operator_of(pattern)
    node = helper.make_node(name, ["x", *tensors], ["y"], domain=functions.DOMAIN, in_features=n)
    lead = ["batch", "sequence"][: rank - 1]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", x_type, [*lead, n])],
        [helper.make_tensor_value_info("y", x_type, [*lead, m])],
        [initializer(key, tensor) for key, tensor in tensors.items()],
    )
    whole = n % 8 == 0 if whole_bytes is None else whole_bytes
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, functions.VERSION)],
        functions=[functions.function(name, body, opset, whole)],
        ir_version=10,
    )


def session(model, **options):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    for key, value in options.items():
        setattr(settings, key, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("body", functions.BODIES)
@pytest.mark.parametrize(("pattern", "m", "n"), SHAPES)
def test_body_equals_torch_in_both_engines(pattern, m, n, body):
    for rank, dtype in ((2, torch.bfloat16), (3, torch.float16), (3, torch.float32)):
        weight = helpers.random_weight(m, n, pattern, dtype=dtype)
        if pattern == "unstructured":
            weight[m // 2] = 0.0 if m > 1 else 1.0  # an empty row
        x = torch.randn(2, 3, n) if rank == 3 else torch.randn(4, n)
        model = operator_model(weight, pattern, body, rank=rank)
        onnx.checker.check_model(model, full_check=True)
        expected = x.double() @ weight.double().T
        tolerance = 1e-6 * max(1.0, expected.abs().max().item())
        for run in (session(model).run, ReferenceEvaluator(model).run):
            (y,) = run(None, {"x": x.numpy()})
            assert y.shape == tuple(expected.shape)
            assert np.abs(y - expected.numpy()).max() <= tolerance


@pytest.mark.parametrize("body", functions.BODIES)
def test_identity_input_returns_the_weight_bit_for_bit(body):
    for pattern in ("2:4", "unstructured"):
        weight = helpers.random_weight(70, 16, pattern, dtype=torch.bfloat16)
        (y,) = session(operator_model(weight, pattern, body)).run(None, {"x": np.eye(16, dtype=np.float32)})
        assert np.array_equal(y.T, weight.float().numpy())


@pytest.mark.parametrize("body", functions.BODIES)
def test_half_precision_activations_keep_their_dtype(body):
    weight = helpers.random_weight(24, 32, "2:4", dtype=torch.bfloat16)
    x = torch.randn(3, 32).half()
    (y,) = session(operator_model(weight, "2:4", body, TensorProto.FLOAT16)).run(None, {"x": x.numpy()})
    expected = (x.double() @ weight.double().T).half()
    assert y.dtype == np.float16
    assert np.abs(y.astype(np.float64) - expected.double().numpy()).max() <= 2e-3 * expected.abs().max().item()


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_function_opset_follows_the_model(opset):
    for body in functions.BODIES:
        weight = helpers.random_weight(8, 16, "4:8")
        model = operator_model(weight, "4:8", body, opset=opset)
        assert [entry.version for entry in model.functions[0].opset_import] == [opset]
        onnx.checker.check_model(model, full_check=True)
        x = torch.randn(2, 16)
        (y,) = session(model).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(y, (x @ weight.T).numpy(), atol=1e-5)


def test_the_cut_of_padding_columns_is_only_left_out_on_promise():
    weight = helpers.random_weight(4, 12, "2:4")
    with pytest.raises(Exception, match=r"\{2,12\} and|dimension|mismatch|Incompatible|[Ss]hape"):
        session(operator_model(weight, "2:4", "folding", whole_bytes=True)).run(
            None, {"x": np.ones((2, 12), np.float32)}
        )


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_runtime_folds_one_body_and_not_the_other(pattern, tmp_path):
    """After ONNX Runtime's optimizer: a dense MatMul weight, or still the compressed bytes and a Scan."""
    m, n = 96, 64
    weight = helpers.random_weight(m, n, pattern, dtype=torch.bfloat16)
    found = {}
    for body in functions.BODIES:
        path = tmp_path / f"{body}.onnx"
        session(operator_model(weight, pattern, body), optimized_model_filepath=str(path))
        graph = onnx.load(str(path)).graph
        dense = any(
            tensor.data_type == TensorProto.FLOAT and list(tensor.dims) == [n, m] for tensor in graph.initializer
        )
        found[body] = {node.op_type for node in graph.node}, dense
    operators, dense = found["folding"]
    assert dense and "Gather" not in operators and "CumSum" not in operators
    operators, dense = found["streaming"]
    assert "Scan" in operators and not dense
