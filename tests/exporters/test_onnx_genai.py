"""Folders for onnxruntime-genai, opened by the real one."""

import numpy as np
import pytest
import torch

import helpers
from sparse_rt.config import ExportOptions
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import genai, library
from sparse_rt.exporters.onnx.exporter import OnnxOptions
from sparse_rt.hf.load import load
from sparse_rt.workflows.export import export

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
NEW_TOKENS = 24


def exported(folder, family, pattern="unstructured", **options):
    dense = helpers.tiny_model(folder / "dense", family, num_hidden_layers=2)
    source = helpers.compress_folder(dense, folder / "sparse", pattern)
    chosen = {"genai": True, **options}
    export(ExportOptions.build(model=str(source), output_dir=folder / "onnx", to="onnx", options=chosen))
    return source, folder / "onnx"


def genai_tokens(folder, prompt):
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompt) + NEW_TOKENS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_transformers(tmp_path, family):
    source, folder = exported(tmp_path, family)
    prompt = list(range(5, 14))
    before = library.calls()
    tokens = genai_tokens(folder, prompt)
    model = load(source, dtype=torch.float32, dequantize=True)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert tokens == expected[0, len(prompt) :].tolist()
    # The copy in the folder is a library of its own, with a counter of its own.
    assert library.calls() == before and (folder / library.FILE_NAME).is_file()


def test_what_genai_does_not_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not run models of type 'opt' .* it runs llama, mistral"):
        exported(tmp_path, "opt")
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(UserError, match="genai is for form=function, not form=dense"):
        OnnxOptions.build(genai=True, form="dense")


def test_one_token_of_several_pads():
    assert genai._first(None, [7, 8], 0) == 7
    assert genai._first(3, [7], 0) == 3
    assert genai._first(None, None, 0) == 0
