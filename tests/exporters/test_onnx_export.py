"""Exported models: sizes, names, agreement with torch, the README's program, and damage that the check must see."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import helpers
from sparse_rt.checkpoint import Checkpoint, WeightEntry, file_digest
from sparse_rt.config import ConvertOptions, ExportOptions, GenerateOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.onnx import session, which_kernel
from sparse_rt.exporters.onnx.body import choose_body, outlook
from sparse_rt.exporters.onnx.exporter import OnnxExporter, OnnxOptions
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.exporters.onnx.trace import trace
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export
from sparse_rt.workflows.generate import generate


def exported(folder, family, pattern, **options):
    """(sparse-rt folder, ONNX folder, result) of a one-layer model, checked in ONNX Runtime."""
    dense = helpers.tiny_model(folder / "dense", family, num_hidden_layers=1)
    source = helpers.compress_folder(dense, folder / "sparse", pattern)
    output = folder / "onnx"
    result = export(ExportOptions.build(model=str(source), output_dir=output, to="onnx", check=True, options=options))
    return source, output, result


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("llama"), "llama", "2:4")


def initializers(output):
    return {tensor.name: tensor for tensor in onnx.load(str(output / "model.onnx")).graph.initializer}


def external(output):
    """Initializer name -> external data fields of those that live in the data file."""
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }


def assert_agrees(result):
    check = result["check"]
    assert check["greedy_equal"] == check["greedy_tokens"] == 64
    for name in ("prefill", "decode", "padded_batch"):
        assert 0 < check[f"{name}_max_difference"] < 1e-5 * max(1.0, check["logit_scale"]), name


def test_llama_agrees_with_torch(llama):
    _, output, result = llama
    assert_agrees(result)
    assert result["check"]["weights_equal"] == 7
    assert result["facts"]["form"] == "function" and result["facts"]["body"] == "folding"
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "README.md"} <= set(result["files"])
    assert result["bytes"] == sum(file.stat().st_size for file in output.iterdir())


def test_the_same_holds_for_the_operators_of_the_library(llama):
    _, output, result = llama
    check = result["check"]
    assert check["kernel"].startswith("native (") and check["native_greedy_equal"] == 64
    for name in ("prefill", "decode", "padded_batch"):
        assert 0 < check[f"native_{name}_max_difference"] < 1e-5 * max(1.0, check["logit_scale"]), name
    assert OnnxModel(output, kernel="native").kernel == check["kernel"]
    assert OnnxModel(output, kernel="body").kernel == "body"
    assert which_kernel(session(output, threads=1)) == check["kernel"]


def test_the_check_generates_no_more_than_the_model_has_positions(tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", "opt", num_hidden_layers=1, max_position_embeddings=32)
    source = helpers.compress_folder(dense, tmp_path / "sparse", "2:4")
    (tmp_path / "onnx").mkdir()
    OnnxExporter().export(source, tmp_path / "onnx")
    figures = OnnxExporter().check(source, tmp_path / "onnx")
    assert figures["greedy_equal"] == figures["greedy_tokens"] == 32 - 17


def test_generate_from_an_exported_folder(llama):
    source, output, _ = llama
    words = {"prompt": "def main():", "max_new_tokens": 12}
    found = generate(GenerateOptions.build(model=str(output), engine="onnx", **words))
    assert found["token_ids"] == generate(GenerateOptions.build(model=str(source), **words))["token_ids"]
    assert re.fullmatch(r"onnxruntime [\d.]+, compressed layers: native \(\w+\)", found["engine"])
    with pytest.raises(UserError, match="device cuda: the engine onnx runs on the CPU"):
        generate(GenerateOptions.build(model=str(output), engine="onnx", device="cuda", **words))


def test_weights_stay_compressed_on_disk(llama):
    source, output, result = llama
    checkpoint, tensors = Checkpoint.open(source), initializers(output)
    for name in checkpoint.weights:
        for part in ("weight_values", "weight_meta"):
            stored = tensors[f"{name}.{part}"]
            assert len(stored.raw_data) == checkpoint.tensors[f"{name}.{part}"].nbytes
        assert f"{name}.weight" not in tensors
    assert result["files"]["model.onnx.data"] < 1.02 * checkpoint.total_bytes
    assert result["weight_bytes"] < 1.05 * checkpoint.total_bytes


def test_data_is_page_aligned_and_graph_is_small(llama):
    _, output, _ = llama
    offsets = [int(fields["offset"]) for fields in external(output).values()]
    assert offsets and all(offset % 4096 == 0 for offset in offsets)
    assert (output / "model.onnx").stat().st_size < 100_000


def test_graph_is_readable(llama):
    _, output, _ = llama
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    nodes = {node.name: node for node in proto.graph.node if node.domain == "sparse_rt"}
    node = nodes["model.layers.0.mlp.down_proj"]
    assert nodes.pop("lm_head").op_type == "DenseLinear"
    assert len(nodes) == 7 and node.op_type == "Sparse24Linear"
    assert list(node.input)[1:] == [f"{node.name}.weight_values", f"{node.name}.weight_meta"]
    assert {entry.key: entry.value for entry in node.metadata_props} == {
        "sparse_rt.pattern": "2:4",
        "sparse_rt.sparsity": "0.500000",
    }
    notes = {entry.key: entry.value for entry in proto.metadata_props}
    assert notes["sparse_rt.body"] == "folding" and notes["sparse_rt.form"] == "function"
    assert not proto.graph.sparse_initializer
    assert [entry.name for entry in proto.graph.output] == ["logits", "present.0.key", "present.0.value"]
    cache = next(entry for entry in proto.graph.input if entry.name == "past_key_values.0.key")
    assert [d.dim_param or d.dim_value for d in cache.type.tensor_type.shape.dim] == [
        "batch_size",
        2,
        "past_sequence_length",
        16,
    ]
    text = proto.SerializeToString()
    assert str(output.parent).encode() not in text and b"/site-packages/" not in text


def test_manifest_says_what_every_layer_is_and_why(llama):
    source, output, result = llama
    manifest = json.loads((output / "sparse_rt.json").read_text())
    assert manifest["layers"].pop("lm_head") == {"dense": "dense in the checkpoint (ignore)"}
    assert manifest["layers"].pop("model.embed_tokens") == {"dense": "an embedding"}
    down = manifest["layers"]["model.layers.0.mlp.down_proj"]
    assert down == {"pattern": "2:4", "shape": [64, 160], "nnz": 64 * 80, "values": "bfloat16"}
    assert len(manifest["layers"]) == 7
    assert manifest["source"]["manifest_sha256"] == file_digest(source / "sparse_rt.manifest.json")
    assert manifest["export"]["body"] == "folding" and "within fold_budget=4GB" in manifest["export"]["body_reason"]
    assert manifest["check"] == result["check"]
    assert result["facts"]["notes"][0].startswith("folding: without our operators")


def test_program_of_the_readme_runs_without_sparse_rt(llama):
    _, output, _ = llama
    program = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    program += "\nimport sys\nassert 'sparse_rt' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=output, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" not in done.stderr  # no warnings about the graph
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens = OnnxModel(output).generate(tokenizer("def main():")["input_ids"], 20)
    assert done.stdout == tokenizer.decode(tokens[0]) + "\n"


def test_generate_batches_times_and_stops(llama):
    _, output, _ = llama
    model = OnnxModel(output, threads=1)
    prompts = np.arange(3, 15).reshape(2, 6)
    both = model.generate(prompts, 5)
    assert both.shape == (2, 5)
    assert model.timings.load > 0 and model.timings.prefill > 0 and len(model.timings.decode) == 4
    for row in range(2):
        alone = model.generate(prompts[row], 5)
        assert np.array_equal(alone[0], both[row])
        stopped = model.generate(prompts[row], 5, eos=int(alone[0, 1]))
        assert stopped.shape[1] <= 2 and stopped[0, -1] == alone[0, 1]
    with pytest.raises(UserError, match=r"no model\.onnx"):
        OnnxModel(output / "nowhere")


@pytest.fixture
def damaged(llama, tmp_path):
    source, output, _ = llama
    return source, shutil.copytree(output, tmp_path / "copy")


def flip_byte(output, initializer, position=0):
    offset = int(external(output)[initializer]["offset"]) + position
    with (output / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_check_sees_one_flipped_bit_of_a_compressed_weight(damaged):
    source, output = damaged
    flip_byte(output, "model.layers.0.mlp.up_proj.weight_values")
    with pytest.raises(CheckFailed, match=r"up_proj: 1 of 10240 weights"):
        OnnxExporter().check(source, output)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_check_sees_one_flipped_bit_of_a_dense_weight(damaged, name):
    source, output = damaged
    flip_byte(output, name, 8192)
    with pytest.raises(CheckFailed, match=rf"dense weight {name} in the ONNX file differs from the checkpoint"):
        OnnxExporter().check(source, output)


def test_check_sees_a_graph_that_computes_something_else(damaged):
    """Every weight is right, and the layers read each other's."""
    source, output = damaged
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    nodes = {node.name: node for node in proto.graph.node}
    gate, up = (nodes[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up"))
    gate.input[1], up.input[1] = up.input[1], gate.input[1]
    gate.input[2], up.input[2] = up.input[2], gate.input[2]
    (output / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match=r"prefill logits of ONNX Runtime differ from torch by"):
        OnnxExporter().check(source, output)


def test_check_sees_an_invalid_graph(damaged):
    source, output = damaged
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    proto.graph.node[-1].input[0] = "nothing"
    (output / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match="not a valid ONNX model"):
        OnnxExporter().check(source, output)


def test_biases_tied_embeddings_bitmask_groups_and_streaming(tmp_path):
    """Qwen2 at 4:8: biases become Add, the tied table is stored once, N:M goes through BitmaskLinear."""
    source, output, result = exported(tmp_path, "qwen2", "4:8", body="streaming")
    assert_agrees(result)
    tensors = initializers(output)
    table = [name for name, tensor in tensors.items() if 4096 in tensor.dims]
    assert table == ["model.embed_tokens.weight"]
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    assert {node.op_type for node in proto.graph.node if node.domain == "sparse_rt"} == {"BitmaskLinear", "DenseLinear"}
    assert "Scan" in {node.op_type for function in proto.functions for node in function.node}
    offsets = onnx.numpy_helper.to_array(tensors["model.layers.0.mlp.up_proj.row_offsets"])
    assert np.array_equal(offsets, np.arange(161) * 32)
    assert result["files"]["model.onnx.data"] < 1.05 * Checkpoint.open(source).total_bytes


def test_opt_unstructured(tmp_path):
    """Another family: LayerNorm, learned positions, biases everywhere, no grouped heads."""
    _, _, result = exported(tmp_path, "opt", "unstructured")
    assert_agrees(result)
    assert result["check"]["weights_equal"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pattern", "options"),
    [
        ("llama", "unstructured", {}),
        ("llama", "2:4", {"form": "inline"}),
        ("qwen3", "unstructured", {"form": "inline", "body": "streaming"}),
        ("qwen2", "2:4", {"form": "dense"}),
        ("mistral", "4:8", {"opset": 18}),
    ],
)
def test_other_forms_and_families(tmp_path, family, pattern, options):
    source, output, result = exported(tmp_path, family, pattern, **options)
    assert_agrees(result)
    proto = onnx.load(str(output / "model.onnx"), load_external_data=False)
    domains = {entry.domain for entry in proto.opset_import}
    assert ("sparse_rt" in domains) == (options.get("form", "function") == "function")
    if options.get("form") == "dense":
        assert result["facts"]["body"] is None
        assert result["weight_bytes"] > 0.99 * result["dense_bytes"]
    else:
        assert result["weight_bytes"] < 1.1 * Checkpoint.open(source).total_bytes


def test_gpt_neox_whose_head_has_another_name_in_the_checkpoint(tmp_path):
    """embed_out is the model's lm_head; compressed it is found as well."""
    dense = helpers.tiny_model(tmp_path / "dense", "gpt_neox", num_hidden_layers=1)
    options = dict(method="magnitude", pattern="unstructured", sparsity=0.5, ignore=[])
    convert(ConvertOptions.build(model=str(dense), output_dir=tmp_path / "sparse", **options))
    assert "embed_out" in Checkpoint.open(tmp_path / "sparse").weights
    given = dict(model=str(tmp_path / "sparse"), output_dir=tmp_path / "onnx", to="onnx", check=True)
    result = export(ExportOptions.build(**given))
    assert_agrees(result)
    assert result["check"]["weights_equal"] == 5


def sizes(*shapes):
    """A stand-in for a checkpoint too large to build: only its table of weights is read."""
    entries = {
        f"layer.{index}": WeightEntry("unstructured", m, n, nnz, torch.bfloat16, None)
        for index, (m, n, nnz) in enumerate(shapes)
    }
    return SimpleNamespace(weights=entries)


def chosen(checkpoint, **options):
    return choose_body(checkpoint, OnnxOptions(**options)).name


def test_body_is_chosen_by_what_folding_would_cost():
    small, large = sizes((4096, 4096, 8 << 20)), sizes(*[(4096, 4096, 8 << 20)] * 10)
    assert chosen(small) == "folding" and chosen(large) == "streaming"
    assert chosen(large, fold_budget="20GB") == "folding"
    assert chosen(small, body="streaming") == "streaming"
    assert chosen(large, form="dense") is None
    choice = choose_body(large, OnnxOptions())
    assert choice.fold_bytes == 10 * 4096 * 4096 * 32
    sentence = "folding takes about 5.4 GB while a session opens, more than fold_budget=4GB"
    assert sentence in choice.reason and sentence in outlook(choice)
    assert choose_body(large, OnnxOptions(values="int8")).fold_bytes == 10 * 4096 * 4096 * 40


def test_a_model_without_a_key_value_cache_is_refused():
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=input_ids.float(), past_key_values=None)

    with pytest.raises(UserError, match="Recurrent cannot be exported to ONNX"):
        trace(Recurrent(), 23)


def test_weights_beyond_the_limits_of_a_node():
    head = sizes((128256, 4096, 1 << 28))
    assert chosen(head, fold_budget="1000GB") == "streaming"
    with pytest.raises(UserError, match=r"layer\.0 has 525336576 weights.*body=streaming or form=dense"):
        choose_body(head, OnnxOptions(body="folding"))
    with pytest.raises(UserError, match="use form=dense"):
        choose_body(sizes((1 << 17, 1 << 15, 1 << 31)), OnnxOptions(body="streaming"))
