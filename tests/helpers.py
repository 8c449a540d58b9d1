"""Small models and weights that tests build for themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt import assets
from sparse_rt.checkpoint import CheckpointWriter, SourceCheckpoint, SparseConfig, matches, output_directory
from sparse_rt.config import FinetuneOptions
from sparse_rt.formats import get_format, normalize_zeros

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def random_weight(m: int, n: int, pattern: str, sparsity: float = 0.5, dtype=torch.float32, seed: int = 0) -> Tensor:
    """A weight [m, n] that obeys ``pattern``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    mask = get_format(pattern).mask_from_scores(weight.abs(), sparsity)
    return torch.where(mask, weight, 0.0).to(dtype)


def compressed(m: int, n: int, pattern: str, sparsity: float = 0.5, dtype=torch.float32, seed: int = 0):
    """(values, metadata, dense weight) of a random weight."""
    weight = random_weight(m, n, pattern, sparsity, dtype, seed)
    fmt = get_format(pattern)
    return *fmt.compress(weight, fmt.mask_of(weight)), weight


_COMMON = dict(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)


# What a family has beside _COMMON: sizes that all its members have, and what only it has. None: without the common one.
_FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=True, head_dim=16)),
    "gemma": ("GemmaConfig", dict(tie_word_embeddings=True, head_dim=32)),
    "gemma2": (
        "Gemma2Config",
        dict(tie_word_embeddings=True, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    ),
    "llama3": (
        "LlamaConfig",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(tie_word_embeddings=True, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=6),
    ),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", dict(num_key_value_heads=None)),
    "bert": ("BertConfig", dict(tie_word_embeddings=True)),
    "roberta": ("RobertaConfig", dict(tie_word_embeddings=True, max_position_embeddings=256 + 2)),
    "albert": ("AlbertConfig", dict(embedding_size=32)),
    "deberta": (
        "DebertaV2Config",  # as version 3 is published
        dict(
            tie_word_embeddings=True,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            position_buckets=16,
            share_att_key=True,
            type_vocab_size=0,
            position_biased_input=False,
        ),
    ),
    "modernbert": ("ModernBertConfig", dict(cls_token_id=0, sep_token_id=0, tie_word_embeddings=True)),
    "distilbert": ("DistilBertConfig", dict(dim=64, hidden_dim=160, n_layers=2, n_heads=4, tie_word_embeddings=True)),
    "t5": ("T5Config", dict(d_model=64, d_ff=160, num_layers=1, num_heads=4, d_kv=16)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "phimoe": ("PhimoeConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("GptOssConfig", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96)),
}


def _config(family: str, **overrides):
    import transformers

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "opt":
        fields = dict(vocab_size=4096, hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4)
        fields |= dict(max_position_embeddings=256, word_embed_proj_dim=64)
        return transformers.OPTConfig(**{**fields, **special, **overrides})
    name, own = _FAMILIES[family]
    fields = {key: value for key, value in {**_COMMON, **own}.items() if value is not None}
    return getattr(transformers, name)(**{**fields, **special, **overrides})


def tiny_model(
    folder: Path,
    family: str = "llama",
    dtype=torch.bfloat16,
    seed: int = 0,
    auto: str = "AutoModelForCausalLM",
    **overrides,
) -> Path:
    """Save a small random model of ``family`` (opt, or a key of ``_FAMILIES``) with the shipped tokenizer."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(_config(family, **overrides))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.05)
    if family.startswith("gemma"):  # its embeddings are multiplied by sqrt(hidden): next to nothing else would be heard
        with torch.no_grad():
            model.get_input_embeddings().weight *= 0.1
    model.to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        source = assets.model_dir() / name
        if source.is_file():
            shutil.copy(source, Path(folder) / name)
    return Path(folder)


def tiny_llama(folder: Path, **overrides) -> Path:
    return tiny_model(folder, "llama", **overrides)


# Linear modules whose names do not end in _proj: of OPT, and the experts of Mixtral.
LINEARS = ("fc1", "fc2", "w1", "w2", "w3")


def compress_folder(
    source: Path, output: Path, pattern: str, sparsity: float = 0.5, ignore=("lm_head", "gate")
) -> Path:
    """A sparse-rt folder of ``source`` by magnitude, without the convert workflow."""
    dense = SourceCheckpoint.open(source)
    fmt = get_format(pattern)
    with output_directory(output) as partial:
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, partial / name)
        writer = CheckpointWriter(partial, dense.config, SparseConfig(pattern=pattern, ignore=list(ignore)))
        for name in dense.tensors:
            tensor = dense.load(name)
            module = name.removesuffix(".weight")
            linear = name.endswith(("_proj.weight", *(f"{module}.weight" for module in LINEARS)))
            if not (linear or module == "lm_head") or any(matches(module, left) for left in ignore):
                writer.add(name, tensor)
                continue
            weight = normalize_zeros(tensor)
            m, n = weight.shape
            values, metadata = fmt.compress(weight, fmt.mask_from_scores(weight.float().abs(), sparsity))
            writer.add_weight(module, pattern, m, n, values, metadata)
        writer.finish({"source": {"model": str(source)}})
    return Path(output)


def edit_config(folder: Path, **changes) -> None:
    """Change keys of ``quantization_config`` in a model folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def run_until_killed(workflow: str, options, after: int, cwd: Path) -> None:
    """Run ``sparse_rt.workflows.<workflow>`` in a process that kills itself (kill -9) after ``after`` tracked steps."""
    code = f"""
import os, signal
from sparse_rt.config import {type(options).__name__}
from sparse_rt.progress import Progress
from sparse_rt.workflows.{workflow} import {workflow}

class Kill(Progress):
    def track(self, items, description, total=None):
        for done, item in enumerate(items):
            if done == {after}:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

{workflow}({type(options).__name__}(**{options.model_dump(mode="json")!r}), Kill())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode != -signal.SIGKILL:
        raise AssertionError(f"{workflow} was not killed: exit code {done.returncode}\n{done.stderr[-2000:]}")


def run_processes(command, timeout=240, cwd=None, **environment):
    """Run a launcher on CPUs, in a process group of its own so that no process of it is left behind."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{errors[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def short_run(model, dataset, output, /, trainer=(), adapter="spp", **changes) -> FinetuneOptions:
    """Options of a fine-tuning of four steps with four rows each."""
    fields = dict(model=str(model), output_dir=output, dataset=str(dataset), max_seq_len=32, adapter=adapter)
    usual = dict(max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_strategy="no")
    return FinetuneOptions.build(**{**fields, "trainer": {**usual, **dict(trainer)}, **changes})
