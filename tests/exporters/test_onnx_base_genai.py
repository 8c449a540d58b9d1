"""base=genai: the graph of the real model builder, run by the real ONNX Runtime and the real onnxruntime-genai."""

import ctypes
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
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ExportOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.onnx import library
from sparse_rt.exporters.onnx.exporter import OnnxOptions
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.exporters.onnx.rows import can_join
from sparse_rt.exporters.onnx.stored import StoredWeights
from sparse_rt.hf.load import load
from sparse_rt.workflows.export import export

OPERATORS = ("GroupQueryAttention", "SkipSimplifiedLayerNormalization", "MatMul", "BitmaskLinear")
NEW_TOKENS = 24
PROMPT = list(range(5, 22))
# What a family is tested with beside its defaults; windows shorter than the prompt, so that they matter, and for Gemma
# a width whose root, with which embeddings are multiplied, has more than two digits: the builder rounds it.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"hidden_size": 96},
    "gemma2": {"hidden_size": 96, "sliding_window": 8},
    "phi3": {},
}


def compressed(folder, family="llama", pattern="unstructured", **overrides):
    dense = helpers.tiny_model(folder / "dense", family, **overrides)
    return helpers.compress_folder(dense, folder / "sparse", pattern)


def exported(source, output, check=True, **options):
    chosen = {"base": "genai", **options}
    return export(ExportOptions.build(model=str(source), output_dir=output, to="onnx", check=check, options=chosen))


def torch_tokens(source):
    model = load(source, dtype=torch.float32, dequantize=True)
    found = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return found[0, len(PROMPT) :].tolist()


def genai_tokens(folder, prompts=(PROMPT,)):
    """The new tokens of every prompt; prompts of one length only."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompts[0]) + NEW_TOKENS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(i)))[len(PROMPT) :] for i in range(len(prompts))]


def calls_of_the_copy(folder):
    handle = ctypes.CDLL(str(folder / library.FILE_NAME))
    handle.sparse_rt_ort_calls.restype = ctypes.c_int64
    return handle.sparse_rt_ort_calls()


def graph(folder):
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def nodes_by_name(folder):
    return {node.name: node for node in graph(folder).graph.node}


def assert_agrees(check):
    for prefix in ("", "native_"):
        assert check[f"{prefix}greedy_equal"] == check[f"{prefix}greedy_tokens"] >= 24
        for name in ("prefill", "decode", "padded_batch"):
            assert 0 < check[f"{prefix}{name}_max_difference"] < 1e-5 * max(1.0, check["logit_scale"]), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(sparse-rt folder, exported folder, result) of a checked two-layer Llama."""
    folder = tmp_path_factory.mktemp("llama")
    source = compressed(folder)
    return source, folder / "onnx", exported(source, folder / "onnx")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_transformers(tmp_path, family, pattern):
    source = compressed(tmp_path, family, pattern, **FAMILIES[family])
    result = exported(source, tmp_path / "onnx")
    assert_agrees(result["check"])
    expected = torch_tokens(source)
    assert OnnxModel(tmp_path / "onnx", kernel="body").generate(PROMPT, NEW_TOKENS).tolist() == [expected]
    assert OnnxModel(tmp_path / "onnx", kernel="native").generate(PROMPT, NEW_TOKENS).tolist() == [expected]
    before = calls_of_the_copy(tmp_path / "onnx")
    assert genai_tokens(tmp_path / "onnx") == [expected]
    # qkv, o, gate, up and down of two layers (gate and up are one matrix in Phi-3), and the head.
    operators = sum(node.domain == "sparse_rt" for node in graph(tmp_path / "onnx").graph.node)
    assert operators == (9 if family == "phi3" else 11)
    assert calls_of_the_copy(tmp_path / "onnx") - before == operators * NEW_TOKENS


def test_three_projections_become_one_operator(llama):
    source, folder, result = llama
    nodes = nodes_by_name(folder)
    assert result["check"]["weights_equal"] == 14  # q, k and v are counted and compared one by one
    node = nodes["model.layers.1.self_attn.qkv_proj"]
    projections = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    assert {entry.key: entry.value for entry in node.metadata_props}["sparse_rt.rows"] == ",".join(projections)
    assert node.op_type == "BitmaskLinear" and not set(projections) & set(nodes)
    tensors = {tensor.name: tensor for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer}
    checkpoint = Checkpoint.open(source)
    values = np.frombuffer(tensors[f"{node.name}.weight_values"].raw_data, np.uint16)
    stored = [checkpoint.load_weight(name)[0].view(torch.uint16).numpy() for name in projections]
    assert np.array_equal(values, np.concatenate(stored))
    offsets = np.frombuffer(tensors[f"{node.name}.row_offsets"].raw_data, np.int32)
    assert offsets.size == 64 + 32 + 32 + 1 and offsets[-1] == values.size


def test_manifest_lists_what_is_joined(llama):
    _, folder, _ = llama
    layers = json.loads((folder / "sparse_rt.json").read_text())["layers"]
    joined = layers["model.layers.1.self_attn.qkv_proj"]
    assert joined["joins"] == [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    assert joined["shape"] == [128, 64] and joined["pattern"] == "unstructured" and joined["values"] == "bfloat16"
    assert "model.layers.1.self_attn.q_proj" not in layers
    assert layers["model.layers.1.mlp.down_proj"]["shape"] == [64, 160]
    assert layers["lm_head"]["dense"] == "dense in the checkpoint (ignore)"


def test_the_graph_is_the_builders_and_holds_no_dense_weight(llama):
    source, folder, result = llama
    proto = graph(folder)
    count = {name: sum(node.op_type == name for node in proto.graph.node) for name in OPERATORS}
    assert count == {"GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 4, "MatMul": 0, "BitmaskLinear": 10}
    assert [entry.name for entry in proto.graph.input][:2] == ["input_ids", "attention_mask"]
    assert result["facts"]["base"] == "genai" and result["facts"]["opset"] == 22
    stored = Checkpoint.open(source).total_bytes
    assert result["files"]["model.onnx.data"] < 1.1 * stored
    text = proto.SerializeToString()
    assert str(folder.parent).encode() not in text and b"/site-packages/" not in text


def test_genai_runs_the_functions_where_there_is_no_library(llama, tmp_path):
    source, folder, _ = llama
    shutil.copytree(folder, tmp_path / "plain")
    path = tmp_path / "plain" / "genai_config.json"
    config = json.loads(path.read_text())
    assert config["search"]["past_present_share_buffer"] is True
    assert "position_ids" not in config["model"]["decoder"]["inputs"]
    assert config["model"]["decoder"]["session_options"].pop("custom_ops_library") == library.FILE_NAME
    (tmp_path / "plain" / library.FILE_NAME).unlink()
    path.write_text(json.dumps(config))
    assert genai_tokens(tmp_path / "plain") == [torch_tokens(source)]


def test_genai_continues_a_batch(llama):
    _, folder, _ = llama
    other = [token + 50 for token in PROMPT]
    alone = [genai_tokens(folder, [prompt])[0] for prompt in (PROMPT, other)]
    assert genai_tokens(folder, [PROMPT, other]) == alone and alone[0] != alone[1]


def test_padded_sequences_go_on_token_by_token(llama):
    source, folder, _ = llama
    ids = np.random.default_rng(0).integers(0, 4096, (3, 16))
    mask = np.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    model = OnnxModel(folder)
    logits, past = model.step(ids[:, :12], mask[:, :12])
    found = [logits]
    for length in range(13, 17):
        logits, past = model.step(ids[:, length - 1 : length], mask[:, :length], past)
        found.append(logits)
    positions = torch.tensor(np.maximum(mask.cumsum(-1) - 1, 0))
    reference = load(source, dtype=torch.float32, dequantize=True)
    with torch.no_grad():
        expected = reference(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions).logits
    difference = np.abs(np.concatenate(found, axis=1) - expected.numpy())[mask == 1]
    assert difference.max() < 1e-5


@pytest.mark.parametrize("ignore", [("lm_head", "q_proj"), ("lm_head", "q_proj", "k_proj", "v_proj")])
def test_dense_projections(tmp_path, ignore):
    """One of three dense: each has an operator of its own. All of them dense: they are joined."""
    dense = helpers.tiny_model(tmp_path / "dense", "qwen2")
    source = helpers.compress_folder(dense, tmp_path / "sparse", "unstructured", ignore=ignore)
    result = exported(source, tmp_path / "onnx")
    assert_agrees(result["check"])
    nodes = nodes_by_name(tmp_path / "onnx")
    joined = "model.layers.0.self_attn.qkv_proj" in nodes
    assert joined == (len(ignore) == 4)
    if not joined:
        assert nodes["model.layers.0.self_attn.k_proj"].op_type == "BitmaskLinear"
        assert nodes["model.layers.0.self_attn.q_proj"].op_type == "DenseLinear"
    assert genai_tokens(tmp_path / "onnx") == [torch_tokens(source)]


def test_tied_embeddings_are_stored_once(tmp_path):
    source = compressed(tmp_path, "qwen2", num_hidden_layers=1)
    exported(source, tmp_path / "onnx", check=False)
    tables = [tensor for tensor in graph(tmp_path / "onnx").graph.initializer if list(tensor.dims) == [4096, 64]]
    assert len(tables) == 1 and tables[0].data_type == onnx.TensorProto.BFLOAT16
    biases = [tensor.name for tensor in graph(tmp_path / "onnx").graph.initializer if tensor.name.endswith(".bias")]
    assert biases == ["model.layers.0.attn.qkv_proj.Add.bias"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dense_form(tmp_path, pattern):
    source = compressed(tmp_path, "qwen3", pattern)
    result = exported(source, tmp_path / "onnx", form="dense")
    check = result["check"]
    assert check["greedy_equal"] == check["greedy_tokens"] and check["kernel"] == "body"
    assert {entry.domain for entry in graph(tmp_path / "onnx").opset_import} == {"", "com.microsoft"}
    assert not (tmp_path / "onnx" / library.FILE_NAME).exists()
    assert genai_tokens(tmp_path / "onnx") == [torch_tokens(source)]


def test_rotary_embeddings_are_those_of_the_model(tmp_path):
    """The builder's class for Llama passes over every scaling but llama3."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    source = compressed(tmp_path, "llama", num_hidden_layers=1, rope_parameters=rope)
    assert_agrees(exported(source, tmp_path / "onnx")["check"])


def test_streaming_body(tmp_path):
    source = compressed(tmp_path, "llama", num_hidden_layers=1)
    assert_agrees(exported(source, tmp_path / "onnx", body="streaming")["check"])


def test_what_cannot_be_built_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="form=inline is for base=portable, base=genai allows form=function"):
        OnnxOptions.build(base="genai", form="inline")
    with pytest.raises(UserError, match="opset is for base=portable.*leave it out"):
        OnnxOptions.build(base="genai", opset=23)
    assert OnnxOptions.build(base="genai", form="dense").genai
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    source = compressed(tmp_path, "llama", num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(UserError, match=r"does not build this llama model \(.* of type dynamic.*\); use base=portable"):
        exported(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match=r"sparse-rt\[genai\]"):
        exported(source, tmp_path / "onnx")


def test_damage_to_a_joined_weight_is_found(llama, tmp_path):
    source, folder, _ = llama
    shutil.copytree(folder, tmp_path / "damaged")
    tensor = next(t for t in graph(folder).graph.initializer if t.name.endswith("1.self_attn.qkv_proj.weight_values"))
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with (tmp_path / "damaged" / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        file.write(b"\x01\x02")
    with pytest.raises(CheckFailed, match="layers.1.self_attn.qkv_proj: 1 of 8192 weights"):
        StoredWeights(Checkpoint.open(source), tmp_path / "damaged" / "model.onnx").check()


def test_program_of_the_readme_runs_without_sparse_rt(llama):
    _, folder, _ = llama
    text = (folder / "README.md").read_text()
    assert "padded on the right" in text and "sparse_rt.rows" in text and "TensorRT" not in text
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    program += "\nimport sys\nassert 'sparse_rt' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "onnxruntime" not in done.stderr, done.stderr


def test_heads_of_which_a_part_is_rotated(tmp_path):
    partial = {"partial_rotary_factor": 0.5, "num_hidden_layers": 1}
    source = compressed(tmp_path, "phi3", hidden_size=128, **partial)
    assert_agrees(exported(source, tmp_path / "onnx")["check"])
    narrow = compressed(tmp_path / "narrow", "phi3", **partial)
    with pytest.raises(UserError, match="rotates 8 columns of a head, GroupQueryAttention multiples of 16.*portable"):
        exported(narrow, tmp_path / "narrow" / "onnx")


def test_only_weights_that_are_stored_alike_are_joined():
    entry = SimpleNamespace(pattern="2:4", m=8, n=16, dtype=torch.bfloat16)
    others = {
        "bitmask": SimpleNamespace(pattern="unstructured", m=8, n=16, dtype=torch.bfloat16),
        "wide": SimpleNamespace(pattern="2:4", m=8, n=16, dtype=torch.float32),
    }
    dense = {"dense.weight": SimpleNamespace(shape=(8, 16), dtype=torch.bfloat16)}
    checkpoint = SimpleNamespace(weights={"a": entry, "b": entry, **others}, tensors=dense)
    assert can_join(checkpoint, ["a", "b"], limit=257) and not can_join(checkpoint, ["a", "b"], limit=256)
    for other in ("bitmask", "wide", "dense", "missing"):
        assert not can_join(checkpoint, ["a", other], limit=1000), other
