"""Fixtures shared by all tests: a fixed seed, no network, and small models built once a session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import helpers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def dense_llama(tmp_path_factory):
    """A random two-layer Llama folder in bfloat16."""
    return helpers.tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session", params=["2:4", "unstructured"])
def sparse_llama(request, dense_llama, tmp_path_factory):
    """The same Llama compressed, once per pattern."""
    folder = tmp_path_factory.mktemp("models") / request.param.replace(":", "-")
    return helpers.compress_folder(dense_llama, folder, request.param)
