"""Whole models at the oldest, a middle and the newest opset, in ONNX Runtime and in OpenVINO, against torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import helpers
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.exporters.onnx import functions
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.hf.load import load

TOLERANCE = 1e-4
IDS = np.arange(5, 29).reshape(2, 12)
# What the operator that reads the weights of a model is called.
OPERATORS = {"unstructured": "BitmaskLinear", "2:4": "Sparse24Linear", "int8": functions.QUANTIZED}
# In groups of which a row has several; activations as they are, so that our library has to agree with torch.
INT8 = {"values": "int8", "group_size": 64, "activations": "float32"}


@dataclass
class Case:
    """A sparse-rt folder, the logits of torch, and how it is exported."""

    name: str
    source: Path
    expected: np.ndarray
    options: dict


@pytest.fixture(scope="module", params=OPERATORS)
def case(request, tmp_path_factory):
    """A layer of Qwen2, for its biases and the shared table."""
    folder, int8 = tmp_path_factory.mktemp("opsets"), request.param == "int8"
    # q * scale in float32 is what the operator computes; as bfloat16 torch would round it once more.
    dtype = torch.float32 if int8 else torch.bfloat16
    dense = helpers.tiny_model(folder / "dense", "qwen2", dtype, num_hidden_layers=1)
    source = helpers.compress_folder(dense, folder / "sparse", "2:4" if request.param == "2:4" else "unstructured")
    reference = source
    if int8:
        reference = folder / "int8"
        reference.mkdir()
        Int8Exporter().export(source, reference, group_size=INT8["group_size"])
    with torch.no_grad():
        logits = load(reference, dtype=torch.float32, dequantize=True)(torch.as_tensor(IDS)).logits.numpy()
    return Case(request.param, source, logits, INT8 if int8 else {})


@pytest.fixture
def exported(case, tmp_path):
    """Exports with options, into a folder that is gone after the test."""

    def export(**options):
        folder = tmp_path / "onnx"
        folder.mkdir()
        OnnxExporter().export(case.source, folder, **case.options, **options)
        return folder

    yield export
    shutil.rmtree(tmp_path, ignore_errors=True)


def by_one_token(model):
    """Logits when the second half of the prompt comes token by token."""
    half = IDS.shape[1] // 2
    logits, past = model.step(IDS[:, :half], np.ones((2, half)))
    steps = [logits]
    for position in range(half, IDS.shape[1]):
        logits, past = model.step(IDS[:, position : position + 1], np.ones((2, position + 1)), past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


@pytest.mark.parametrize("body", functions.BODIES)
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_every_opset_agrees_with_torch(exported, case, opset, body):
    folder = exported(opset=opset, body=body)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert {function.name for function in proto.functions} == {OPERATORS[case.name], functions.DENSE}
    for function in proto.functions:
        assert [entry.version for entry in function.opset_import if entry.domain == ""] == [opset]
    for kernel in ("body", "native"):
        model = OnnxModel(folder, threads=1, kernel=kernel)
        assert model.kernel.startswith(kernel)
        assert np.abs(model.logits(IDS) - case.expected).max() < TOLERANCE
        assert np.abs(by_one_token(model) - case.expected).max() < TOLERANCE


@pytest.mark.parametrize("opset", [18, 23])
def test_openvino_runs_the_inline_form(exported, case, opset):
    """With body=folding: OpenVINO 2026.4 cannot read the Scan of the other one."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
    folder = exported(form="inline", body="folding", opset=opset)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    core = openvino.Core()
    # On processors that have it, OpenVINO computes in bfloat16 unless told otherwise.
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shapes = {value.get_any_name(): value.get_partial_shape() for value in compiled.inputs}
    half = IDS.shape[1] // 2
    past = {
        name: np.zeros((2, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    found, seen = [], 0
    for part in (IDS[:, :half], IDS[:, half:]):  # the second prompt goes on from the first
        positions = np.tile(np.arange(seen, seen + half), (2, 1))
        seen += half
        results = compiled(
            {"input_ids": part, "attention_mask": np.ones((2, seen), int), "position_ids": positions} | past
        )
        past = {name: results[name.replace("past_key_values.", "present.")] for name in past}
        found.append(results["logits"])
    assert np.abs(np.concatenate(found, axis=1) - case.expected).max() < 1e-3
