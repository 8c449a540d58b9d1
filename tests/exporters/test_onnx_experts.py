"""Mixtures of experts as ONNX: only chosen experts run, and what comes out is what transformers computes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import compressed, exported

from sparse_rt.benchmarking.onnx_quantized import quantize
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ExportOptions, GenerateOptions
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import session, which_kernel
from sparse_rt.exporters.onnx.experts import Experts, branches
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.exporters.onnx.graph import all_nodes
from sparse_rt.families.experts import _split_class
from sparse_rt.hf.load import load
from sparse_rt.workflows.export import export
from sparse_rt.workflows.generate import generate

COUNT, HIDDEN, WIDTH = 5, 6, 4


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    source = compressed(folder, "mixtral", "2:4")
    return source, folder / "onnx", exported(source, folder / "onnx")


@pytest.mark.parametrize(
    ("family", "pattern", "options"),
    [
        ("qwen3_moe", "unstructured", {"body": "streaming"}),
        ("qwen3_moe", "4:8", {"form": "inline", "opset": 18}),
        ("mixtral", "unstructured", {"values": "int8"}),
        ("mixtral", "2:4", {"form": "dense"}),
        ("phimoe", "2:4", {}),
    ],
)
def test_logits_and_tokens_are_those_of_torch(tmp_path, family, pattern, options):
    source = compressed(tmp_path, family, pattern)
    check = exported(source, tmp_path / "onnx", **options)["check"]
    assert check["weights_equal"] == len(Checkpoint.open(source).weights) > 2 * 12
    assert check["greedy_equal"] == check["greedy_tokens"] == 64
    for run in ("prefill", "decode", "padded_batch"):
        assert 0 < check[f"{run}_max_difference"] < 1e-5 * max(1.0, check["logit_scale"]), run
    function = options.get("form", "function") == "function"
    assert which_kernel(session(tmp_path / "onnx", threads=1)).startswith("native (") == function


def test_generated_from_the_exported_folder(mixtral):
    source, output, result = mixtral
    assert result["check"]["native_greedy_equal"] == 64
    words = {"prompt": "def main():", "max_new_tokens": 12}
    found = generate(GenerateOptions.build(model=str(output), engine="onnx", **words))
    assert found["token_ids"] == generate(GenerateOptions.build(model=str(source), **words))["token_ids"]


def test_every_expert_is_a_branch_whose_weights_stay_compressed(mixtral):
    source, output, result = mixtral
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    chosen = [node for node in proto.graph.node if node.op_type == "If"]
    assert len(chosen) == 2 * 4 and chosen[0].name == "model.layers.0.mlp.experts.0"
    for node in chosen:
        (taken,) = [entry.g for entry in node.attribute if entry.name == "then_branch"]
        assert [inner.op_type for inner in taken.node if inner.domain == "sparse_rt"] == ["Sparse24Linear"] * 3
    operators = [node for node in all_nodes(proto.graph) if node.op_type == "Sparse24Linear"]
    assert len(operators) == len(Checkpoint.open(source).weights) == 2 * (4 + 4 * 3)
    assert result["facts"]["nodes"] == sum(1 for _ in all_nodes(proto.graph)) > len(proto.graph.node)
    assert result["weight_bytes"] < 1.1 * Checkpoint.open(source).total_bytes


def test_experts_that_stay_dense_are_exported_beside_compressed_ones(tmp_path):
    source = compressed(tmp_path, "mixtral", "2:4", ignore=("lm_head", "re:.*experts.[13].*"))
    check = exported(source, tmp_path / "onnx")["check"]
    assert check["greedy_equal"] == check["native_greedy_equal"] == 64 and check["weights_equal"] == 2 * (4 + 2 * 3)
    proto = onnx.load(str(tmp_path / "onnx" / "model.onnx"), load_external_data=False)
    kinds = {node.name: node.op_type for node in all_nodes(proto.graph) if node.domain == "sparse_rt"}
    assert kinds["model.layers.0.mlp.experts.0.w1"] == "Sparse24Linear"
    assert kinds["model.layers.0.mlp.experts.1.w1"] == "DenseLinear"


def mixture():
    """A session of experts that multiply by a matrix each, with squares in between; and their matrices."""
    random = np.random.default_rng(0)
    first, down = (
        random.standard_normal(shape).astype(np.float32) for shape in ((COUNT, HIDDEN, WIDTH), (COUNT, WIDTH, HIDDEN))
    )
    tensors = {f"{name}.{e}": array[e] for name, array in (("first", first), ("down", down)) for e in range(COUNT)}
    square = helper.make_graph(
        [helper.make_node("Pow", ["a", "two"], ["b"], name="square")],
        "square",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])],
    )
    experts = Experts([[f"first.{e}"] for e in range(COUNT)], [[f"down.{e}"] for e in range(COUNT)], square)
    node = helper.make_node("Experts", ["x", "index", "weights"], ["y"], domain="sparse_rt", module="block")
    nodes = branches(node, experts, lambda name, x, y: [helper.make_node("MatMul", [x, name], [y], name=name)])
    kinds = {"x": TensorProto.FLOAT, "index": TensorProto.INT64, "weights": TensorProto.FLOAT}
    inputs = [
        helper.make_tensor_value_info(name, kind, ["t", HIDDEN if name == "x" else "k"]) for name, kind in kinds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", HIDDEN])
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(list(nodes), "mixture", inputs, [output], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options), first, down


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 2), (7, 2), (40, 3), (3, COUNT)])
def test_weighted_sum_of_the_chosen_experts(tokens, k):
    runtime, first, down = mixture()
    random = np.random.default_rng(tokens)
    x, weights = (random.standard_normal((tokens, size)).astype(np.float32) for size in (HIDDEN, k))
    index = np.stack([random.permutation(COUNT)[:k] for _ in range(tokens)])
    (found,) = runtime.run(None, {"x": x, "index": index, "weights": weights})
    expected = np.zeros((tokens, HIDDEN))
    for token in range(tokens):
        for place in range(k):
            expert = index[token, place]
            inner = (x[token].astype(np.float64) @ first[expert]) ** 2
            expected[token] += weights[token, place] * (inner @ down[expert])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_token_meets_only_the_experts_that_it_chose():
    """NaN would spread through any product that it is in."""
    runtime, *_ = mixture()
    feed = {"x": np.full((2, HIDDEN), np.nan, np.float32), "weights": np.ones((2, 1), np.float32)}
    feed["x"][1] = 1.0
    (found,) = runtime.run(None, {**feed, "index": np.array([[0], [3]])})
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_onnxruntimes_quantization_reaches_into_the_branches(mixtral, tmp_path, bits):
    """The dense int8 and int4 models of `bench --engine onnx`: experts left out would make ours look good."""
    source, _, _ = mixtral
    dense, output = tmp_path / "dense", tmp_path / "quantized"
    for folder in (dense, output):
        folder.mkdir()
    OnnxExporter().export(source, dense, form="dense")
    facts = quantize(dense, output, bits)
    assert facts["quantized"] == 2 * (4 + 4 * 3) + 1
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    assert not [node for node in all_nodes(proto.graph) if node.op_type == "MatMul" and "proj" in node.name]
    feed = {"input_ids": np.arange(3, 15)[None], "attention_mask": np.ones((1, 12), np.int64)}
    feed["position_ids"] = np.arange(12)[None]
    runtime = session(output, threads=1)
    feed |= {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in runtime.get_inputs()
        if entry.name.startswith("past")
    }
    found = runtime.run(["logits"], feed)[0]
    with torch.no_grad():
        expected = load(source, dtype=torch.float32, dequantize=True)(torch.as_tensor(feed["input_ids"])).logits.numpy()
    assert 0 < np.abs(found - expected).max() < (0.05 if bits == 8 else 0.5)
    assert (output / "model.onnx.data").stat().st_size < 0.8 * (dense / "model.onnx.data").stat().st_size


def test_experts_that_compute_in_a_way_of_their_own_are_refused(mixtral, tmp_path, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    given = dict(model=str(mixtral[0]), output_dir=tmp_path / "out", to="onnx")
    with pytest.raises(UserError, match="does not run models of type 'mixtral'"):
        export(ExportOptions.build(**given, options={"genai": True}))
    monkeypatch.delattr(MixtralExperts, "_apply_gate")
    with pytest.raises(UserError, match=r"the experts model\.layers\.0\.mlp\.experts \(MixtralExperts\) have gate_up_"):
        export(ExportOptions.build(**given))
    assert not (tmp_path / "out").exists()
    fused = compressed(tmp_path / "fused", "gpt_oss")
    with pytest.raises(UserError, match=r"the experts model\.layers\.0\.mlp\.experts are one tensor with three dim"):
        export(ExportOptions.build(model=str(fused), output_dir=tmp_path / "out", to="onnx"))


def test_blocks_that_compute_differently_between_their_products(tmp_path, monkeypatch, request):
    """Every second block limits what goes into its second product (as Step 3.7 does by a table)."""
    from transformers.models.mixtral import modeling_mixtral as mixtral_code

    made, built = mixtral_code.MixtralExperts.__init__, []

    def limited(self, *arguments, **named):
        made(self, *arguments, **named)
        self.limit = 0.001 if len(built) % 2 else 1e6
        built.append(self)

    def apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows, places = torch.where(top_k_index == expert)
            if len(rows):
                inner = self._apply_gate(torch.nn.functional.linear(hidden_states[rows], self.gate_up_proj[expert]))
                y = torch.nn.functional.linear(inner, self.down_proj[expert]) * top_k_weights[rows, places, None]
                total.index_add_(0, rows, y)
        return total

    monkeypatch.setattr(mixtral_code.MixtralExperts, "__init__", limited)
    monkeypatch.setattr(mixtral_code.MixtralExperts, "_apply_gate", apply_gate)
    monkeypatch.setattr(mixtral_code.MixtralExperts, "forward", forward)
    _split_class.cache_clear()  # it keeps the forward of a class
    request.addfinalizer(_split_class.cache_clear)
    source = compressed(tmp_path, "mixtral", initializer_range=0.2)
    assert exported(source, tmp_path / "onnx")["check"]["greedy_equal"] == 64
