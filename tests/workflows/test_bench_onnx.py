"""``bench --engine onnx``: dense, sparse, and ONNX Runtime's int8 and int4 of the dense model, side by side."""

import json
import statistics

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import helpers
from sparse_rt.benchmarking.onnx_quantized import BLOCK_SIZE, quantize
from sparse_rt.benchmarking.onnx_sides import Side, chosen_sides, compared
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import BenchOptions
from sparse_rt.exporters.onnx import library
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.workflows.bench import bench, kernel_warnings, table_rows

# Large enough that weights stand out from what else a session allocates.
SIZES = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4)
OURS = ("sparse", "sparse int8")
AGAINST = ("dense", "int8 MatMulNBits", "int4 MatMulNBits")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench-onnx")
    dense = helpers.tiny_llama(folder / "dense", **SIZES)
    return helpers.compress_folder(dense, folder / "sparse", "unstructured", 0.75)


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(sparse, **changes):
    fields = dict(model=str(sparse), engine=["onnx"], repeats=2, prompt_tokens=8, new_tokens=6) | changes
    return bench(BenchOptions.build(**fields))


def rows_of(result, phase, ours="sparse"):
    """The rows of the engine in which ``ours`` meets the others."""
    return [
        row
        for row in result["rows"]
        if row["engine"] == "onnx" and row["phase"] == phase and row["models"]["sparse"] == ours
    ]


@pytest.fixture(scope="module")
def whole_run(sparse, one_thread, tmp_path_factory):
    report = tmp_path_factory.mktemp("bench-onnx") / "report"
    return run(sparse, phase=["disk", "load", "prefill", "decode"], report=report), report


@pytest.mark.slow
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("phase", ["disk", "load", "prefill", "decode"])
def test_both_files_of_ours_meet_every_other_model(whole_run, phase, ours):
    rows, plain = rows_of(whole_run[0], phase, ours), rows_of(whole_run[0], phase)
    assert [row["models"]["dense"] for row in rows] == list(AGAINST)
    name = "" if ours == "sparse" else f"{ours} "
    expected = [name.strip(), *(f"{name}against {other}" for other in AGAINST[1:])]
    assert [row["what"].partition(", ")[2] for row in rows] == expected
    for row, other in zip(rows, plain, strict=True):
        # One measurement of each model, in turn with all the others.
        assert row["sparse"] == rows[0]["sparse"] and row["dense"] == other["dense"]
        ratios = [a / b for a, b in zip(row["dense"]["samples"], row["sparse"]["samples"], strict=True)]
        assert row["ratio"]["samples"] == ratios and row["ratio"]["median"] == statistics.median(ratios)
        assert len(ratios) == (1 if phase == "disk" else 2) and min(row["dense"]["samples"]) > 0
    assert (rows[0]["sparse"] != plain[0]["sparse"]) == (ours != "sparse")


@pytest.mark.slow
def test_files_are_as_large_as_their_weights(whole_run, sparse):
    dense, int8, int4 = (row["dense"]["median"] for row in rows_of(whole_run[0], "disk"))
    weights = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024) + 4096 * 256  # linear layers and the head
    assert dense - int8 == pytest.approx(weights * (2 - 1 - 4 / BLOCK_SIZE), rel=0.02)
    assert int8 - int4 == pytest.approx(weights * 0.5, rel=0.02)
    plain, rounded = (rows_of(whole_run[0], "disk", ours)[0] for ours in OURS)
    # Our int8: one byte of the two of every kept value, and a float32 scale a row.
    saved = sum(entry.nnz - 4 * entry.m for entry in Checkpoint.open(sparse).weights.values())
    assert plain["sparse"]["median"] - rounded["sparse"]["median"] == pytest.approx(saved, rel=0.02)
    assert rounded["ratio"]["median"] > plain["ratio"]["median"] > 1


@pytest.mark.slow
def test_table_report_and_settings_name_the_models(whole_run):
    result, report = whole_run
    assert json.loads((report / "report.json").read_text()) == json.loads(json.dumps(result, default=str))
    markdown = (report / "report.md").read_text()
    for cells in table_rows(result):
        assert " | ".join(str(cell) for cell in cells) in markdown
    assert "onnx decode, batch 1, against int4 MatMulNBits" in markdown
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")
    settings = result["engines"]["onnx"]
    assert "not lossless" in settings["quantized"] and settings["exported"]["int4 MatMulNBits"]["bits"] == 4
    assert [settings["exported"][name]["values"] for name in OURS] == ["plain", "int8"]
    assert "onnx decode, batch 1, sparse int8 against int4 MatMulNBits" in markdown
    native = f"native ({library.isa()})"
    assert settings["kernels"] == dict.fromkeys(OURS, native)
    assert not any("in place of our operators" in warning for warning in result["warnings"])


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(sparse, one_thread):
    result = run(sparse, phase=["memory"], repeats=1)
    rows = {(row["what"].partition(", ")[0], row["models"]["dense"]): row for row in rows_of(result, "memory")}
    kinds = ("anonymous after one prompt", "resident after one prompt", "resident at its peak")
    assert [*rows] == [(kind, other) for kind in kinds for other in AGAINST]
    # The values stay in the mapped file; the other models are copied out of theirs.
    for other in AGAINST:
        assert rows[kinds[0], other]["ratio"]["median"] > 1.1
        anonymous, resident, peak = (rows[kind, other]["dense"]["median"] for kind in kinds)
        assert 0 < anonymous < resident <= peak
    assert rows[kinds[0], "dense"]["dense"]["median"] > 4 * 3 * 3 * 256 * 1024  # float32 weights of the blocks
    rounded = rows_of(result, "memory", "sparse int8")
    assert [(row["what"].partition(", ")[0], row["models"]["dense"]) for row in rounded] == [*rows]
    assert all(row["ratio"]["median"] > 1.1 for row in rounded[: len(AGAINST)])
    assert set(result["engines"]["onnx"]["kernels"]) == set(OURS)


@pytest.mark.slow
def test_without_the_quantized_models(sparse, one_thread):
    result = run(sparse, phase=["disk", "prefill"], repeats=1, quantized=False)
    assert {row["models"]["dense"] for row in result["rows"]} == {"dense"}
    assert set(result["engines"]["onnx"]["exported"]) == {"dense", "sparse"}
    assert set(result["engines"]["onnx"]["kernels"]) == {"sparse"}
    assert "quantized" not in result["engines"]["onnx"] and not any("MatMulNBits" in note for note in result["notes"])


@pytest.mark.slow
def test_a_run_without_our_operators_is_no_measurement_of_them(dense_export, one_thread, monkeypatch):
    monkeypatch.setattr(library, "unavailable_reason", lambda: "no C compiler was found; install one")
    result = run(dense_export.parent / "sparse", phase=["load"], repeats=1, quantized=False)
    assert result["engines"]["onnx"]["kernels"] == {"sparse": "body"}
    (warning,) = kernel_warnings(result["engines"])
    assert warning in result["warnings"]
    assert "in place of our operators (sparse)" in warning and warning.endswith("no C compiler was found; install one")


def test_sides_are_lines_of_a_table():
    assert [side.name for side in chosen_sides(False)] == ["dense", "sparse"]
    assert [side.name for side in chosen_sides(True)] == ["dense", "sparse", *AGAINST[1:], "sparse int8"]
    sides = [Side("dense"), Side("sparse", ours=True), Side("int4", bits=4), Side("sparse int8", ours=True)]
    assert compared(sides) == [
        ("dense", "sparse"),
        ("int4", "sparse"),
        ("dense", "sparse int8"),
        ("int4", "sparse int8"),
    ]


# ---- the quantized models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense_export(tmp_path_factory):
    """Widths that are no multiple of a block, and biases."""
    folder = tmp_path_factory.mktemp("quantized")
    model = helpers.tiny_model(folder / "dense", "qwen2", num_hidden_layers=1, intermediate_size=200)
    source = helpers.compress_folder(model, folder / "sparse", "unstructured")
    (folder / "onnx").mkdir()
    OnnxExporter().export(source, folder / "onnx", form="dense")
    return folder / "onnx"


def by_ort(weight, bits):
    """The node and the initializers that ONNX Runtime's quantizer makes of a MatMul by ``weight`` [in, out]."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size])
        for name, size in zip("xy", weight.shape, strict=True)
    ]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], name="layer")
    graph = helper.make_graph([node], "one", values[:1], values[1:], [numpy_helper.from_array(weight, "weight")])
    quantizer = MatMulNBitsQuantizer(
        helper.make_model(graph), bits=bits, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    made = quantizer.model.model.graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    return made.node[0], [tensors[name] for name in made.node[0].input[1:]]


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_what_the_quantizer_of_onnx_runtime_makes(dense_export, tmp_path, bits):
    facts = quantize(dense_export, tmp_path, bits)
    source = onnx.load(str(dense_export / "model.onnx"))
    dense = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in source.graph.initializer}
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node if node.op_type == "MatMulNBits"}
    assert len(nodes) == facts["quantized"] == 8 and "lm_head" in nodes
    for name, node in nodes.items():
        owner = "model.embed_tokens" if name == "lm_head" else name  # Qwen2 ties them
        expected, parts = by_ort(np.ascontiguousarray(dense[f"{owner}.weight"].T), bits)
        assert sorted(map(str, node.attribute)) == sorted(map(str, expected.attribute))
        for found, part in zip(node.input[1:], parts, strict=True):
            assert np.array_equal(tensors[found].reshape(-1), part.reshape(-1))
    read = {name for node in graph.node for name in node.input}
    assert set(tensors) <= read  # the weights that were quantized are gone
    assert {node.output[0] for node in graph.node} <= read | {value.name for value in graph.output}


def test_quantized_models_answer_like_the_dense_one(dense_export, tmp_path):
    ids = np.arange(3, 27)[None]
    expected = OnnxModel(dense_export).logits(ids)
    errors = []
    for bits in (8, 4):
        (tmp_path / str(bits)).mkdir()
        quantize(dense_export, tmp_path / str(bits), bits)
        found = OnnxModel(tmp_path / str(bits)).logits(ids)
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    assert 0 < errors[0] < 0.05 and errors[0] < errors[1] < 0.5
