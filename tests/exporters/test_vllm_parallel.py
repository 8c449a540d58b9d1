"""Several ranks for real: tensor, expert and pipeline parallelism, in processes of vLLM's own (on CPUs it has no Ray).

Greedy tokens in float32 equal those of transformers, whoever holds which part. Every case takes about half a minute.
"""

import os

import pytest
import torch

import helpers
from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm.agreement import compare, greedy
from sparse_rt.exporters.vllm.engine import generate_tokens
from sparse_rt.hf.load import load

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = [[5, 17, 900, 33], [120, 7, 2000], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
MAX_TOKENS = 12
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one core each
# torch.compile without its code generator, which takes a minute: the graph is traced through our operators as well.
TRACED = {"mode": 2, "backend": "eager"}
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    made = {}
    for name, pattern, sizes in (
        # One key-value head for two ranks: both hold it. The head is compressed, and its 4001 rows do not divide.
        ("llama", "unstructured", dict(num_key_value_heads=1, vocab_size=4001)),
        ("mixtral", "2:4", {}),
        ("qwen3_moe", "unstructured", {}),
    ):
        source = helpers.tiny_model(
            root / name, name, dtype=torch.float32, hidden_size=128, head_dim=32, initializer_range=0.1, **sizes
        )
        ignore = ("gate",) if name == "llama" else ("gate", "lm_head")
        made[name] = helpers.compress_folder(source, root / f"{name}-sparse", pattern, 0.6, ignore)
    return made


def assert_same_tokens(folders, name, eager=True, env=None, **options):
    options = {"dtype": "float32", **options}
    served = generate_tokens(folders[name], PROMPTS, MAX_TOKENS, eager, RANKS | (env or {}), options)
    reference = greedy(load(folders[name]), PROMPTS, MAX_TOKENS)
    report = compare(reference, served["tokens"], torch.float32)
    assert report["compared"] == report["equal"] == len(PROMPTS) * MAX_TOKENS, report


@needs_two_cores
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tensor_parallel(folders, name):
    assert_same_tokens(folders, name, tensor_parallel_size=2)


@needs_two_cores
def test_expert_parallel(folders):
    assert_same_tokens(folders, "qwen3_moe", tensor_parallel_size=2, enable_expert_parallel=True)


@needs_two_cores
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_pipeline_parallel_and_compiled(folders, name):
    """vLLM 0.32 makes the buffers between stages on a CPU only where it compiles, dense models included."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert_same_tokens(folders, name, eager=False, env=env, pipeline_parallel_size=2, compilation_config=TRACED)


def test_a_size_that_does_not_fit_is_refused_with_those_that_do(tmp_path):
    dense = helpers.tiny_model(tmp_path / "dense", hidden_size=128, head_dim=32, intermediate_size=100)
    folder = helpers.compress_folder(dense, tmp_path / "sparse", "2:4")
    with pytest.raises(UserError, match=r"down_proj is 2:4, and in the part of a rank 50 .*sizes that do: 1$"):
        generate_tokens(folder, PROMPTS, 2, env=RANKS, options={"tensor_parallel_size": 2})
