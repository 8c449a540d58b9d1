"""vLLM as it is started without --enforce-eager: torch.compile with its code generator, through our operators."""

import pytest
import torch

import helpers
from sparse_rt.exporters.vllm.agreement import compare, greedy
from sparse_rt.exporters.vllm.engine import generate_tokens
from sparse_rt.hf.load import load

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = [[5, 17, 900, 33], [120, 7, 2000], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
MAX_TOKENS = 12


@pytest.mark.parametrize("family, pattern", [("llama", "unstructured"), ("mixtral", "2:4")])
def test_the_compiled_model_says_the_same_as_transformers(tmp_path, family, pattern):
    sizes = dict(hidden_size=128, head_dim=32, initializer_range=0.1)
    dense = helpers.tiny_model(tmp_path / "dense", family, dtype=torch.float32, **sizes)
    folder = helpers.compress_folder(dense, tmp_path / "sparse", pattern, 0.6)
    served = generate_tokens(folder, PROMPTS, MAX_TOKENS, enforce_eager=False, options={"dtype": "float32"})
    report = compare(greedy(load(folder), PROMPTS, MAX_TOKENS), served["tokens"], torch.float32)
    assert report["compared"] == report["equal"] == len(PROMPTS) * MAX_TOKENS, report
