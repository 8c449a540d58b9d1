"""A Llama of random weights of any size, dense and compressed by the project's own conversion, in folders that stay.

What a layer costs does not depend on the values of its weights, only on which are kept. Magnitude pruning of
independent normal weights keeps a random choice of them, which is how an unstructured mask looks to the kernels.

The default is the shape of Llama-3.2-1B but for the vocabulary: 32000 tokens (Llama 2) in place of 128256. The head is
not compressed, and with 128256 tokens it would be 21% of the bytes that a decode step reads; with 32000 it is 6%, so
that the figures tell about the layers that sparsity changes. ``Shape(vocabulary=128256)`` measures the other case.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_rt import assets
from sparse_rt.checkpoint import output_directory
from sparse_rt.config import ConvertOptions
from sparse_rt.progress import Progress
from sparse_rt.workflows.convert import convert

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings; with ``experts``, of a Mixtral whose tokens choose two of them."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    positions: int = 2048
    experts: int = 0

    @property
    def name(self) -> str:
        """Names the folder, so that a folder of other sizes is never taken for this one."""
        sizes = (self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads, self.vocabulary)
        kind = f"mixtral-{self.experts}-" if self.experts else "llama-"
        return kind + "-".join(map(str, sizes))

    @property
    def linear_parameters(self) -> int:
        """Those of the layers that are compressed."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate * max(self.experts, 1))

    @property
    def parameters(self) -> int:
        router = self.layers * self.experts * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + self.vocabulary * self.hidden + router + norms

    def byte_limit(self, pattern: str, sparsity: float) -> float:
        """Weight bytes that a step of a Llama reads, dense / sparse: what decode gains from fewer bytes alone."""
        metadata = 1 / 16  # of a bfloat16 weight: one bit; the positions of 2:4 take as much
        kept = 0.5 if pattern == "2:4" else 1 - sparsity
        head = self.vocabulary * self.hidden
        return (self.linear_parameters + head) / (self.linear_parameters * (kept + metadata) + head)


def dense_folder(workdir: Path, shape: Shape, progress: Progress) -> Path:
    """The dense model in bfloat16, made when it is not there yet; with the tokenizer of the shipped model."""
    folder = workdir / shape.name
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    progress.stage(f"making {folder.name} ({shape.parameters / 1e6:.0f} million parameters)")
    make, more = (MixtralConfig, {"num_local_experts": shape.experts}) if shape.experts else (LlamaConfig, {})
    config = make(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with output_directory(folder) as partial:
        model.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if (assets.model_dir() / name).is_file():
                shutil.copy(assets.model_dir() / name, partial / name)
    return folder


def sparse_folder(workdir: Path, shape: Shape, pattern: str, sparsity: float, progress: Progress) -> Path:
    """The same model compressed, made when it is not there yet."""
    dense = dense_folder(workdir, shape, progress)
    label = pattern.replace(":", "of") if pattern != "unstructured" else f"{pattern}-{sparsity:g}"
    folder = workdir / f"{shape.name}-{label}"
    if folder.is_dir():
        return folder
    progress.stage(f"compressing into {folder.name}")
    # An interrupted conversion is finished from where it stopped.
    convert(
        ConvertOptions(
            model=str(dense), output_dir=folder, pattern=pattern, sparsity=sparsity, method="magnitude", resume=True
        ),
        progress,
    )
    return folder
