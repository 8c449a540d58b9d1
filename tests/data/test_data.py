"""Data sources: every accepted shape, and a sentence for everything else."""

import json

import pytest
import torch

from sparse_rt import assets, data
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = load_tokenizer(assets.model_dir())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert data.read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_shipped_text_is_the_default():
    assert data.read_texts(None) == [assets.calibration_text().read_text(encoding="utf-8")]


def test_text_rows_skip_empty_ones(jsonl):
    # U+2028 is a line separator for str.splitlines, but an ordinary character of a JSON line.
    path = jsonl({"text": "one\u2028more"}, {"text": ""}, {"text": "two"})
    assert data.read_texts(path) == ["one\u2028more", "two"]


def test_json_array(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert data.read_texts(tmp_path / "rows.json") == ["one", "two"]


@pytest.mark.parametrize("row", [SHAREGPT, MESSAGES], ids=["sharegpt", "messages"])
def test_conversations_use_the_chat_template(jsonl, chat_tokenizer, row):
    eos = chat_tokenizer.eos_token
    assert data.read_texts(jsonl(row), chat_tokenizer) == [f"<user>Hi{eos}<assistant>Ho{eos}"]


def test_alpaca_with_and_without_chat_template(jsonl, tokenizer, chat_tokenizer):
    eos = chat_tokenizer.eos_token
    assert data.read_texts(jsonl(ALPACA), chat_tokenizer) == [f"<user>Add\n\n1 2{eos}<assistant>3{eos}"]
    (plain,) = data.read_texts(jsonl(ALPACA), tokenizer)
    assert plain.endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3")
    (short,) = data.read_texts(jsonl({"instruction": "Add", "output": "3"}), tokenizer)
    assert "### Input" not in short and short.endswith("### Instruction:\nAdd\n\n### Response:\n3")


def test_folder_through_datasets(tmp_path, jsonl, tokenizer):
    pytest.importorskip("datasets")
    jsonl({"text": "one"}, {"text": "two"}, name="train.jsonl")
    assert data.read_texts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"question": "a", "answer": "b"}], "columns question, answer"),
        ([MESSAGES], "chat template"),
        ([{"text": "a"}, {"txt": "b"}], "row 2"),
        ([{"text": 3}], "row 1"),
        (["one"], "row 1 is str"),
        ([{"text": " "}], "holds no text"),
    ],
)
def test_rows_refused(jsonl, tokenizer, rows, words):
    with pytest.raises(UserError, match=words):
        data.read_texts(jsonl(*rows), tokenizer)


def test_files_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        data.read_texts(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        data.read_texts("./missing")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"broken.jsonl, line 2: not valid JSON"):
        data.read_texts(tmp_path / "broken.jsonl")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        data.read_texts(tmp_path / "latin.txt")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match="unknown kind"):
        data.read_texts(tmp_path / "a.bin")


def test_windows_cover_the_stream_in_order(tokenizer):
    texts = ["def f():\n    return 1\n" * 20, "class A:\n    pass\n" * 20]
    stream = tokenizer(texts[0])["input_ids"] + [tokenizer.eos_token_id] + tokenizer(texts[1])["input_ids"]
    windows = data.token_windows(texts, tokenizer, 16)
    assert windows.dtype == torch.long and windows.shape == (len(stream) // 16, 16)
    assert windows.flatten().tolist() == stream[: windows.numel()]


def test_random_windows_depend_on_the_seed_only(tokenizer):
    texts = ["def f():\n    return 1\n" * 100]
    first, again, other = (data.token_windows(texts, tokenizer, 8, count=5, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (5, 8) and torch.equal(first, again) and not torch.equal(first, other)
    tokens = tokenizer(texts[0])["input_ids"]
    starts = {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}
    assert all(tuple(window) in starts for window in first.tolist())


def test_short_text_is_refused_with_numbers(tokenizer):
    with pytest.raises(UserError, match=r"has \d+ tokens, one window needs 64"):
        data.token_windows(["short"], tokenizer, 64)


def test_training_rows(jsonl, tokenizer, chat_tokenizer):
    pytest.importorskip("datasets")
    long = "def f():\n    return 1\n" * 30
    rows = data.training_dataset(jsonl({"text": long}), tokenizer, 32)
    assert rows["labels"] == rows["input_ids"] and all(set(mask) == {1} for mask in rows["attention_mask"])
    assert sorted(map(len, rows["input_ids"]))[1:] == [32] * (len(rows) - 1), "plain text is cut, not truncated"
    total = len(tokenizer(long)["input_ids"]) + 1
    assert sum(map(len, rows["input_ids"])) == total, "every token and one end token"

    chat = {"messages": [{"role": "user", "content": long}]}
    truncated = data.training_dataset(jsonl(chat), chat_tokenizer, 32)
    assert [len(row) for row in truncated["input_ids"]] == [32]
    short = data.training_dataset(jsonl(MESSAGES), chat_tokenizer, 32)["input_ids"][0]
    assert chat_tokenizer.decode(short).count(chat_tokenizer.eos_token) == 2, "no second end token"


def test_training_order_depends_on_the_seed_only(jsonl, tokenizer):
    pytest.importorskip("datasets")
    path = jsonl(*({"text": f"x = {i}"} for i in range(20)))
    first, again, other = (data.training_dataset(path, tokenizer, 32, seed=s)["input_ids"] for s in (0, 0, 1))
    assert first == again and first != other and sorted(first) == sorted(other)
