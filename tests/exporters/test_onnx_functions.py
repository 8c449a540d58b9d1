"""The bodies of the ONNX operators against torch: every pattern, width, dtype, in two engines."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_models import operator_model, operator_tensors, quantized_weight, random_weight, session

from sparse_rt.exporters.onnx import functions

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
    ("dense", 1, 1),
    ("dense", 70, 24),
]


@pytest.mark.parametrize("body", functions.BODIES)
@pytest.mark.parametrize(("pattern", "m", "n"), SHAPES)
def test_body_equals_torch_in_both_engines(pattern, m, n, body):
    for rank, dtype in ((2, torch.bfloat16), (3, torch.float16), (3, torch.float32)):
        weight = random_weight(m, n, pattern, dtype=dtype)
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
        weight = random_weight(70, 16, pattern, dtype=torch.bfloat16)
        (y,) = session(operator_model(weight, pattern, body)).run(None, {"x": np.eye(16, dtype=np.float32)})
        assert np.array_equal(y.T, weight.float().numpy())


@pytest.mark.parametrize("body", functions.BODIES)
def test_half_precision_activations_keep_their_dtype(body):
    weight = random_weight(24, 32, "2:4", dtype=torch.bfloat16)
    x = torch.randn(3, 32).half()
    (y,) = session(operator_model(weight, "2:4", body, TensorProto.FLOAT16)).run(None, {"x": x.numpy()})
    expected = (x.double() @ weight.double().T).half()
    assert y.dtype == np.float16
    assert np.abs(y.astype(np.float64) - expected.double().numpy()).max() <= 2e-3 * expected.abs().max().item()


# A pattern for every operator; 70 rows are more than a block, 100 columns no whole bytes and no whole groups.
OPERATORS = {
    "unstructured": "BitmaskLinear",
    "2:4": "Sparse24Linear",
    "int8 64": functions.QUANTIZED,
    "dense": functions.DENSE,
}


@pytest.mark.parametrize("body", functions.BODIES)
@pytest.mark.parametrize("pattern", OPERATORS)
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_function_opset_follows_the_model(opset, pattern, body):
    weight = random_weight(70, 100, pattern)
    model = operator_model(weight, pattern, body, opset=opset)
    (function,) = model.functions
    assert function.name == OPERATORS[pattern] and [entry.version for entry in function.opset_import] == [opset]
    onnx.checker.check_model(model, full_check=True)
    if pattern == "int8 64":
        weight = quantized_weight(operator_tensors(weight, pattern), 70, 100, 64)
    x = torch.randn(3, 100)
    for run in (session(model).run, ReferenceEvaluator(model).run):
        (y,) = run(None, {"x": x.numpy()})
        np.testing.assert_allclose(y, (x.double() @ weight.double().T).numpy(), atol=1e-4)


def test_the_cut_of_padding_columns_is_only_left_out_on_promise():
    weight = random_weight(4, 12, "2:4")
    with pytest.raises(Exception, match=r"\{2,12\} and|dimension|mismatch|Incompatible|[Ss]hape"):
        session(operator_model(weight, "2:4", "folding", whole_bytes=True)).run(
            None, {"x": np.ones((2, 12), np.float32)}
        )


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_runtime_folds_one_body_and_not_the_other(pattern, tmp_path):
    """After ONNX Runtime's optimizer: a dense MatMul weight, or still the compressed bytes and a Scan."""
    m, n = 96, 64
    weight = random_weight(m, n, pattern, dtype=torch.bfloat16)
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
