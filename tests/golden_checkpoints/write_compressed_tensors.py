"""Writes a golden folder with the compressed-tensors that is installed: FORMAT DTYPE FOLDER [MAX_SHARD_SIZE]."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from huggingface_hub import save_torch_state_dict
from transformers import Qwen2Config, Qwen2ForCausalLM

from legacy_folders import GOLDEN_CONFIG, golden_tensors


def main(format_name: str, dtype: str, folder: str, max_shard_size: str = "5GB") -> None:
    release = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
    pattern = "2:4" if "24" in format_name else "unstructured"
    tensors = golden_tensors(getattr(torch, dtype), pattern)
    model = Qwen2ForCausalLM(Qwen2Config(**GOLDEN_CONFIG)).to(getattr(torch, dtype))
    model.load_state_dict(tensors)
    described = {"format": format_name, "global_sparsity": 0.5, "sparsity_structure": pattern}
    if release >= (0, 9):
        described |= {"targets": ["Linear"], "ignore": ["lm_head"]}
    output = Path(folder)
    output.mkdir()
    config = {**GOLDEN_CONFIG, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype}
    if release < (0, 4):  # SparseML wrote the section itself
        from compressed_tensors.config import CompressionConfig

        sparsity = CompressionConfig.load_from_registry(format_name, **described)
        compressed = ModelCompressor.load_from_registry(format_name, config=sparsity).compress(tensors)
        (output / "config.json").write_text(json.dumps(config | {"sparsity_config": sparsity.model_dump()}, indent=1))
    else:
        from compressed_tensors.config import SparsityCompressionConfig

        sparsity = SparsityCompressionConfig.load_from_registry(format_name, **described)
        compressor = ModelCompressor.from_pretrained_model(model, sparsity)
        compressed = compressor.compress(model, tensors)
        (output / "config.json").write_text(json.dumps(config))
        compressor.update_config(folder)
    save_torch_state_dict(
        {name: t.contiguous() for name, t in compressed.items()}, folder, max_shard_size=max_shard_size
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
