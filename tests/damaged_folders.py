"""Copies of sparse-rt folders in which one thing is wrong with the weight ``LAYER``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparse_rt.checkpoint import read_header, sparse_header
from sparse_rt.formats import get_format

LAYER = "model.layers.0.mlp.down_proj"


def damaged(source: Path, output: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy whose tensors and described weights went through ``change(tensors, weights)``; the index fits them."""
    shutil.copytree(source, output)
    (file,) = output.glob("*.safetensors")
    tensors, weights = load_file(file), read_header(file).sparse()["weights"]
    change(tensors, weights)
    save_file(tensors, file, metadata=sparse_header(weights))
    (index,) = output.glob("*.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
    return output


def without_values(tensors, weights):
    del tensors[f"{LAYER}.weight_values"]


def without_metadata(tensors, weights):
    del tensors[f"{LAYER}.{get_format(weights[LAYER]['pattern']).metadata_name}"]


def without_weight(tensors, weights):
    for suffix in get_format(weights.pop(LAYER)["pattern"]).tensor_names:
        del tensors[f"{LAYER}.{suffix}"]


def dense_weight(tensors, weights):
    m, n = weights[LAYER]["shape"]
    without_weight(tensors, weights)
    tensors[f"{LAYER}.weight"] = torch.zeros(m, n)


def integer_values(tensors, weights):
    tensors[f"{LAYER}.weight_values"] = tensors[f"{LAYER}.weight_values"].to(torch.int16)


def flip_bit(tensors, weights):
    tensors[f"{LAYER}.weight_bitmask"][7, 3] ^= 4
