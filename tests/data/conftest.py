"""The shipped tokenizer, bare and with chat templates, and rows on disk."""

import json

import pytest

from sparse_rt import assets
from sparse_rt.hf.load import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(assets.model_dir())


@pytest.fixture
def with_template():
    def make(template):
        tokenizer = load_tokenizer(assets.model_dir())
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return write
