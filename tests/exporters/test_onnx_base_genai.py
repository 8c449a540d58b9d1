"""base=genai: the graph of the real model builder, run by the real ONNX Runtime and the real onnxruntime-genai."""

import ctypes

import numpy as np
import onnx
import pytest
import torch

import helpers
from sparse_rt.config import ExportOptions
from sparse_rt.exporters.onnx import library
from sparse_rt.exporters.onnx.generation import OnnxModel
from sparse_rt.hf.load import load
from sparse_rt.workflows.export import export

NEW_TOKENS = 24
PROMPT = list(range(5, 22))
# What a family is tested with beside its defaults; windows shorter than the prompt, so that they matter.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
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
        assert check[f"{prefix}greedy_equal"] == 24
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
    compressed_nodes = 8  # qkv, o, gate and up, down of two layers; gate and up are one matrix in Phi-3 alone
    assert calls_of_the_copy(tmp_path / "onnx") - before >= compressed_nodes * NEW_TOKENS
