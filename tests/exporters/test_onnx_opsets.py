"""Whole models at the oldest, a middle and the newest opset, in ONNX Runtime and in OpenVINO, against torch."""

import shutil

import numpy as np
import onnx
import pytest
import torch

import helpers
from sparse_rt.exporters.onnx import functions
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.hf.load import load

TOLERANCE = 1e-4
IDS = np.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A layer of Qwen2, for its biases and the shared table."""
    folder = tmp_path_factory.mktemp("opsets")
    dense = helpers.tiny_model(folder / "dense", "qwen2", num_hidden_layers=1)
    return helpers.compress_folder(dense, folder / "sparse", "unstructured")


@pytest.fixture(scope="module")
def expected(source):
    with torch.no_grad():
        return load(source, dtype=torch.float32, dequantize=True)(torch.as_tensor(IDS)).logits.numpy()


@pytest.fixture
def exported(source, tmp_path):
    """Exports with options, into a folder that is gone after the test."""

    def export(**options):
        folder = tmp_path / "onnx"
        folder.mkdir()
        OnnxExporter().export(source, folder, **options)
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
def test_every_opset_agrees_with_torch(exported, expected, opset, body):
    folder = exported(opset=opset, body=body)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert proto.functions
    for function in proto.functions:
        assert [entry.version for entry in function.opset_import if entry.domain == ""] == [opset]
    for kernel in ("body", "native"):
        model = OnnxModel(folder, threads=1, kernel=kernel)
        assert model.kernel.startswith(kernel)
        assert np.abs(model.logits(IDS) - expected).max() < TOLERANCE
        assert np.abs(by_one_token(model) - expected).max() < TOLERANCE


@pytest.mark.parametrize("opset", [18, 23])
def test_openvino_runs_the_inline_form(exported, expected, opset):
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
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-3
