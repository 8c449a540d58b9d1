"""The shipped model and texts: intact, small, loadable without a network, and good enough that pruning can hurt."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_rt import assets
from sparse_rt.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.model_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(assets.model_dir(), local_files_only=True, dtype=torch.float32).eval()


def test_every_asset_matches_its_digest():
    assets.verify()
    listed = {line.split()[1] for line in (assets.heldout_text().parent / "SHA256SUMS").read_text().splitlines()}
    assert {"heldout.txt", "calibration.txt", "finetune.jsonl", "pystdlib-5m/model.safetensors"} <= listed
    assert {f"pystdlib-5m/{path.name}" for path in assets.model_dir().iterdir()} - listed == {"pystdlib-5m/README.md"}


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_asset_is_named(tmp_path, monkeypatch, damage):
    copy = shutil.copytree(assets.heldout_text().parent, tmp_path / "assets")
    monkeypatch.setattr(assets, "_FOLDER", copy)
    victim = copy / "pystdlib-5m" / "config.json"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_text(victim.read_text() + " ")
    with pytest.raises(UserError, match=r"pystdlib-5m/config\.json"):
        assets.verify()


def test_model_folder_stays_small():
    assert sum(path.stat().st_size for path in assets.model_dir().rglob("*")) <= 12e6


def test_checkpoint_is_bf16_with_dimensions_every_kernel_takes(model):
    stored = AutoModelForCausalLM.from_pretrained(assets.model_dir(), local_files_only=True, dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    blocks = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(blocks) == 7 * model.config.num_hidden_layers
    assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in blocks)


def test_tokenizer_round_trip_keeps_every_character(tokenizer):
    text = assets.heldout_text().read_text(encoding="utf-8") + "\t\r\n  trailing  \u00e9\U0001f40d \x00 a\n\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 3


def test_end_token_is_one_known_id(tokenizer, model):
    assert tokenizer("<|endoftext|>")["input_ids"] == [model.config.eos_token_id] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_finetune_rows_have_text_and_none_is_in_the_heldout_text():
    heldout = assets.heldout_text().read_text(encoding="utf-8")
    rows = [json.loads(line) for line in assets.finetune_jsonl().read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100
    assert all(set(row) == {"text"} and row["text"].strip() for row in rows)
    long_rows = [row["text"] for row in rows if len(row["text"]) > 500]  # a file's last row can be one common line
    assert len(long_rows) > 100 and not any(text in heldout for text in long_rows)


def test_dense_perplexity_is_at_most_half_of_any_unigram_model(tokenizer, model):
    """The reference is fitted to the slice itself, so no unigram model does better on it."""
    text = assets.heldout_text().read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    share = torch.bincount(ids).float() / len(ids)
    unigram = math.exp(-share[ids].log().mean().item())
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    with torch.inference_mode():
        logits = model(input_ids=windows).logits[:, :-1]
    dense = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
    assert dense <= unigram / 2
