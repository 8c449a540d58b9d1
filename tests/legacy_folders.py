"""Folders as compressed-tensors 0.9 to 0.14 wrote them, which nothing else loads any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_rt.formats import get_format

# "old" is the first form of sparse-bitmask: ".weight" in the names, another key in config.json.
KINDS = ("sparse-bitmask", "old", "sparse-24-bitmask")


GOLDEN = Path(__file__).parent / "golden_checkpoints"
GOLDEN_CONFIG = dict(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def golden_tensors(dtype: torch.dtype, pattern: str) -> dict[str, Tensor]:
    """The weights of the golden folders, from a formula: every number is exact in bfloat16.

    Pruned projections have a row of zeros, a negative zero and, when 2:4, groups with one and with no nonzero.
    """
    h, i, kv, v = 16, 20, 8, 24
    layer = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"model.layers.0.{name}.weight"] = (h,)
    for name, shape in layer.items():
        shapes[f"model.layers.0.{name}.weight"] = shape
        if name[-6:] in ("q_proj", "k_proj", "v_proj"):
            shapes[f"model.layers.0.{name}.bias"] = shape[:1]
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        index = torch.arange(torch.Size(shape).numel())
        value = ((index * 40503 + number * 9973 + 77) % 4093 % 511 - 255) / 256
        if name.endswith("_proj.weight"):
            if pattern == "2:4":
                pairs = torch.tensor(
                    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
                )
                kept = pairs[(index[: index.numel() // 4] * 7 + number) % 6].flatten().bool()
            else:
                kept = (index * 7919 + number) % 101 % 5 < 2
            value = torch.where(kept, value, 0.0)
            value.view(shape)[2] = 0
            value[kept.nonzero()[3]] = -0.0
        tensors[name] = value.view(shape).to(dtype)
    return tensors


def encode(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one weight, and its mask."""
    mask = weight != 0
    if kind == "sparse-24-bitmask":
        best = weight.abs().view(-1, 4).topk(2, dim=1).indices
        mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, best, True).view(weight.shape)
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    prefix = name if kind == "old" else name.removesuffix(".weight")
    values = weight[mask]
    if kind == "sparse-24-bitmask":
        shape, values = torch.tensor(weight.shape).reshape(-1, 1), values.view(weight.shape[0], -1)
        return {f"{prefix}.compressed": values, f"{prefix}.bitmask": bits, f"{prefix}.shape": shape}, mask
    counts = mask.sum(-1)
    parts = {f"{prefix}.compressed": values, f"{prefix}.bitmask": bits, f"{prefix}.shape": torch.tensor(weight.shape)}
    return parts | {f"{prefix}.row_offsets": counts.cumsum(0) - counts}, mask


def compressed_tensors_folder(dense: Path, target: Path, kind: str, **config_changes):
    """Prune and compress the linear weights of ``dense`` into ``target``; returns the dense weights and the masks."""
    shutil.copytree(dense, target)
    tensors, weights, masks = {}, {}, {}
    pattern = "2:4" if kind == "sparse-24-bitmask" else "unstructured"
    for name, tensor in load_file(dense / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        fmt = get_format(pattern)
        weight = torch.where(fmt.mask_from_scores(tensor.float().abs(), 0.6), tensor, 0)
        weight[3] = 0  # a row of explicit zeros inside the 2:4 mask
        parts, masks[name] = encode(name, weight, kind)
        tensors |= parts
        weights[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    sparsity = {
        "format": kind.replace("old", "sparse-bitmask"),
        "sparsity_structure": pattern,
        "ignore": ["lm_head"],
    }
    section = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    key = "compression_config" if kind == "old" else "quantization_config"
    config[key] = section | {"sparsity_config": sparsity} | config_changes
    (target / "config.json").write_text(json.dumps(config))
    return weights, masks


def dense_folder(source: Path, target: Path, weights: dict[str, Tensor]) -> Path:
    """``source`` with these weights: what such a folder says, stored dense."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors.update(weights)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
