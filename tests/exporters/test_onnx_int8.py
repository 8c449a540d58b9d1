"""BitmaskLinearQ, int8 values with scales: the body and the library against float64 in the real ONNX Runtime."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_models import (
    ISAS,
    counted,
    group_size_of,
    native,
    operator_model,
    operator_tensors,
    quantized_weight,
    random_weight,
    relative_error,
    save,
    session,
)

import helpers
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ExportOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.onnx import functions
from sparse_rt.exporters.onnx.exporter import OnnxExporter, OnnxOptions
from sparse_rt.exporters.onnx.operands import Quantization
from sparse_rt.workflows.export import export

PATTERNS = ("int8", "int8 64", "int8 128", "int8 256")
# One column, less than a group, whole groups and a rest, more than one block of 256 and of 2048 columns, one panel.
SHAPES = [(1, 1), (5, 7), (33, 64), (17, 100), (40, 600), (16, 2304), (18, 4700)]
TOKENS = (1, 2, 3, 5, 8, 11, 12, 13, 40)
FLOAT_X, INT8_X = 0, 4


def made(m, n, pattern):
    """A weight with an empty row, its tensors, and the float64 weight that they stand for."""
    weight = random_weight(m, n, pattern)
    weight[m // 2] = 0.0 if m > 1 else 1.0
    tensors = operator_tensors(weight, pattern)
    return weight, tensors, quantized_weight(tensors, m, n, group_size_of(pattern))


def rounded(x):
    """x as the library rounds it: int8 times a float32 scale for every 256 columns of a token; in float64."""
    tokens, n = x.shape
    blocks = torch.nn.functional.pad(x, (0, -n % 256)).view(tokens, -1, 256)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round().double() * (largest / 127).double()).view(tokens, -1)[:, :n]


@pytest.mark.parametrize("body", functions.BODIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bodies_equal_float64_in_both_engines(pattern, body):
    for m, n in ((1, 1), (70, 100), (64, 320), (5, 8)):
        weight, _, exact = made(m, n, pattern)
        model = operator_model(weight, pattern, body)
        onnx.checker.check_model(model, full_check=True)
        x = torch.randn(4, n)
        for run in (session(model).run, ReferenceEvaluator(model).run):
            (y,) = run(None, {"x": x.numpy()})
            assert relative_error(y, x.double() @ exact.T) <= 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_with_float_activations_equal_float64(use_isa, isa, pattern):
    use_isa(isa)
    for m, n in SHAPES:
        weight, _, exact = made(m, n, pattern)
        runtime = native(operator_model(weight, pattern, None, accuracy_level=FLOAT_X))
        for tokens in TOKENS:
            x = torch.randn(tokens, n)
            (y,), calls = counted(lambda x=x, runtime=runtime: runtime.run(None, {"x": x.numpy()}))
            assert calls == 1
            assert relative_error(y, x.double() @ exact.T) <= 2e-6, (m, n, tokens)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_with_rounded_activations(use_isa, pattern):
    """Against float64 with the very rounding, and so near the exact product as that rounding allows."""
    use_isa("avx512")
    for m, n in SHAPES:
        weight, _, exact = made(m, n, pattern)
        runtime = native(operator_model(weight, pattern, None, accuracy_level=INT8_X))
        for tokens in TOKENS:
            x = torch.randn(tokens, n) * 10 ** torch.randn(tokens, 1)
            (y,) = runtime.run(None, {"x": x.numpy()})
            expected = rounded(x) @ exact.T
            scale = x.double().abs() @ exact.abs().T  # row by row: tokens differ by powers of ten
            assert ((torch.from_numpy(y) - expected).abs() <= 1e-5 * scale + 1e-12).all(), (m, n, tokens)
            error = (torch.from_numpy(y) - x.double() @ exact.T).abs()
            assert (error <= x.abs().amax(1, keepdim=True) / 254 * exact.abs().sum(1) + 1e-5 * scale).all()


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_where_bytes_cannot_be_multiplied_activations_stay_exact(use_isa, isa):
    use_isa(isa)
    weight, _, exact = made(40, 600, "int8 64")
    x = torch.randn(5, 600)
    (y,) = native(operator_model(weight, "int8 64", None, accuracy_level=INT8_X)).run(None, {"x": x.numpy()})
    assert relative_error(y, x.double() @ exact.T) <= 2e-6


def test_threads_change_no_bit():
    weight, *_ = made(300, 520, "int8 128")
    for tokens in (1, 4, 40):
        feed = {"x": torch.randn(tokens, 520).numpy()}
        models = [operator_model(weight, "int8 128", None, accuracy_level=INT8_X) for _ in range(3)]
        found = [native(model, threads).run(None, feed)[0] for threads, model in enumerate(models, 1)]
        assert all(np.array_equal(found[0], other) for other in found[1:])


def test_zeros_infinities_and_nan_in_x_stay_in_their_token():
    weight, _, exact = made(20, 300, "int8")
    x = torch.randn(4, 300)
    x[1], x[2, 5], x[3, 7] = 0.0, float("inf"), float("nan")
    (y,) = native(operator_model(weight, "int8", None, accuracy_level=INT8_X)).run(None, {"x": x.numpy()})
    assert np.isfinite(y[:2]).all() and not y[1].any()
    assert np.abs(y[0] - (x[0].double() @ exact.T).numpy()).max() < 0.05 * np.abs(y[0]).max()
    kept = exact.bool()
    assert not np.isfinite(y[2][kept[:, 5].numpy()]).any() and np.isnan(y[3][kept[:, 7].numpy()]).all()


def test_other_activation_types():
    weight, _, exact = made(24, 96, "int8 64")
    for dtype, kind, tolerance in (
        (torch.float16, onnx.TensorProto.FLOAT16, 1e-2),
        (torch.bfloat16, onnx.TensorProto.BFLOAT16, 2e-2),
    ):
        x = torch.randn(3, 96).to(dtype)
        model = operator_model(weight, "int8 64", None, kind, cast=True, accuracy_level=INT8_X)
        (y,) = native(model).run(None, {"x": x.float().numpy()})
        assert relative_error(y, x.double() @ exact.T) <= tolerance


BAD = {
    "scales of another width": ("scales", lambda t: t[:, :1], r"scales must be \[24, 2\], it has 2 dim.* 24 entries"),
    "scales with a row less": ("scales", lambda t: t[:-1], r"scales must be \[24, 2\]"),
    "values cut": ("values", lambda t: t[:-5], "row_offsets end at value"),
    "mask too narrow": ("mask", lambda t: t[:, :-1], r"mask must be \[rows, 16\] for 128 columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_a_sentence(case):
    name, change, message = BAD[case]
    weight = random_weight(24, 128, "int8 64")
    tensors = operator_tensors(weight, "int8 64")
    runtime = native(operator_model(weight, "int8 64", None, tensors={name: change(tensors[name])}))
    with pytest.raises(Exception, match=rf"sparse_rt\.BitmaskLinearQ: .*{message}"):
        runtime.run(None, {"x": np.ones((1, 128), np.float32)})


def test_an_unknown_group_size():
    model = operator_model(random_weight(24, 128, "int8 64"), "int8 64", None)
    next(entry for entry in model.graph.node[0].attribute if entry.name == "group_size").i = 32
    with pytest.raises(Exception, match="group_size is 32; allowed are 0"):
        native(model).run(None, {"x": np.ones((1, 128), np.float32)})


@pytest.mark.parametrize("tokens", [1, 9])
def test_nothing_behind_the_values_is_read(tmp_path, tokens):
    """The values end with the last page of a mapped file: a byte more would end the process."""
    m, n = 64, 256
    weight = random_weight(m, n, "2:4")
    tensors = operator_tensors(weight, "int8")
    assert tensors["values"].nbytes == 2 * 4096
    save(operator_model(weight, "int8", None, accuracy_level=INT8_X), tmp_path)
    x = torch.randn(tokens, n)
    (y,) = native(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})
    assert relative_error(y, rounded(x) @ quantized_weight(tensors, m, n, None).T) <= 1e-5


# ---- whole models ---------------------------------------------------------------------------------------------------


def exported(folder, family, pattern, **options):
    """The ONNX folder of a one-layer model and what its check found."""
    dense = helpers.tiny_model(folder / "dense", family, num_hidden_layers=1)
    source = helpers.compress_folder(dense, folder / "sparse", pattern)
    given = {"model": str(source), "output_dir": folder / "onnx", "to": "onnx", "check": True, "options": options}
    return folder / "onnx", export(ExportOptions.build(**given))


@pytest.mark.parametrize(
    ("family", "pattern", "options"),
    [
        ("llama", "unstructured", {"group_size": 64}),
        ("llama", "2:4", {"activations": "float32"}),
        ("qwen2", "4:8", {"body": "streaming", "group_size": 128}),
        ("llama", "unstructured", {"form": "inline", "group_size": 64}),
        ("qwen3", "2:4", {"base": "genai"}),
    ],
)
def test_models_are_rounded_on_the_way(tmp_path, family, pattern, options):
    output, result = exported(tmp_path, family, pattern, values="int8", **options)
    check = result["check"]
    assert check["weights_equal"] == 7 and check["greedy_equal"] == check["greedy_tokens"] == 64
    assert 0 < check["int8_values_change_logits_by"] < 0.1
    assert check["prefill_max_difference"] < 1e-5 * max(1.0, check["logit_scale"])
    if options.get("form") != "inline":
        exact = options.get("activations") == "float32"
        assert check["native_tolerance"] == (1e-4 if exact else 0.1)
        assert check["native_prefill_max_difference"] < (1e-5 if exact else 0.1) * max(1.0, check["logit_scale"])
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    kinds = {entry.data_type for entry in proto.graph.initializer if entry.name.endswith(".weight_values")}
    assert kinds == {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    ("pattern", "group_size", "options"),
    [
        ("2:4", None, {}),
        ("unstructured", 64, {"base": "genai"}),
        ("unstructured", 128, {"form": "inline"}),
        ("4:8", 64, {"form": "dense"}),
        ("2:4", 128, {"base": "genai", "activations": "float32"}),
    ],
)
def test_folders_of_int8_values_keep_their_integers(tmp_path, pattern, group_size, options):
    dense = helpers.tiny_model(tmp_path / "dense", "llama", num_hidden_layers=1)
    plain = helpers.compress_folder(dense, tmp_path / "plain", pattern)
    source, output = tmp_path / "int8", tmp_path / "onnx"
    given = {"to": "int8", "options": {"group_size": group_size}}
    export(ExportOptions.build(model=str(plain), output_dir=source, **given))
    result = export(ExportOptions.build(model=str(source), output_dir=output, to="onnx", check=True, options=options))
    check = result["check"]
    assert check["weights_equal"] == 7 and check["greedy_equal"] == check["greedy_tokens"] == 64
    assert "int8_values_change_logits_by" not in check
    proto = onnx.load(str(output / "model.onnx"))
    integers = {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    down = json.loads((output / "sparse_rt.json").read_text())["layers"]["model.layers.0.mlp.down_proj"]
    if options.get("form") == "dense":
        assert not integers and result["facts"]["values"] == "plain"
        assert down == {"dense": "form=dense", "pattern": pattern, "shape": [64, 160], "nnz": 64 * 80}
        assert "int8 values" not in (output / "README.md").read_text()
        return
    assert down["values"] == "int8" and down["group_size"] == group_size
    stored = integers["model.layers.0.mlp.down_proj.weight_values"]
    q, _, _ = Checkpoint.open(source).load_quantized("model.layers.0.mlp.down_proj")
    assert np.array_equal(onnx.numpy_helper.to_array(stored), q.flatten().numpy())


def test_choices_that_would_have_no_effect_are_refused(tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", "llama", num_hidden_layers=1)
    plain = helpers.compress_folder(dense, tmp_path / "plain", "unstructured")
    given = {"to": "int8", "options": {"group_size": 64}}
    export(ExportOptions.build(model=str(plain), output_dir=tmp_path / "int8", **given))
    rounded = Checkpoint.open(tmp_path / "int8")
    Quantization(activations="float32").check(rounded)
    Quantization(quantize=True, group_size=64).check(rounded)
    with pytest.raises(UserError, match=r"has int8 values already \(group_size 64\); leave it out"):
        Quantization(quantize=True, group_size=256).check(rounded)
    with pytest.raises(UserError, match="activations=float32 is for int8 values"):
        Quantization(activations="float32").check(Checkpoint.open(plain))


def test_check_sees_scales_that_are_too_coarse(tmp_path):
    """Every value is then within half of *their* step of nothing at all."""
    output, _ = exported(tmp_path, "llama", "unstructured", values="int8")
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    scales = next(t for t in proto.graph.initializer if t.name == "model.layers.0.mlp.up_proj.weight_scale")
    made = onnx.numpy_helper.to_array(scales) * np.float32(300)
    scales.raw_data = made.tobytes()
    (output / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match=r"weight model.layers.0.mlp.up_proj: \d+ of .* differ"):
        OnnxExporter().check(tmp_path / "sparse", output)


def test_check_sees_a_wrong_int8_value_and_a_wrong_scale(tmp_path):
    output, _ = exported(tmp_path, "llama", "unstructured", values="int8")
    data = output / "model.onnx.data"
    whole = data.read_bytes()
    for part, place in (("weight_values", 0), ("weight_scale", 2)):
        proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
        tensor = next(t for t in proto.graph.initializer if t.name == f"model.layers.0.mlp.up_proj.{part}")
        if tensor.external_data:
            start = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
            data.write_bytes(whole[: start + place] + bytes([whole[start + place] ^ 4]) + whole[start + place + 1 :])
        else:
            raw = bytearray(tensor.raw_data)
            raw[place] ^= 64
            tensor.raw_data = bytes(raw)
            (output / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(CheckFailed, match=r"weight model.layers.0.mlp.up_proj: \d+ of .* differ"):
            OnnxExporter().check(tmp_path / "sparse", output)
        data.write_bytes(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int8", "form": "dense"}, "values=int8 is for form=function and form=inline"),
        ({"group_size": 64}, "group_size is for values=int8"),
        ({"values": "int8", "group_size": 32}, "group_size: Input should be 64, 128 or 256"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        OnnxOptions.build(**options)
