"""Small compressed layers and models that adapters are attached to."""

import pytest

from sparse_rt.hf.load import load


@pytest.fixture
def model(sparse_llama):
    """A fresh compressed Llama, once per pattern."""
    return load(sparse_llama)
