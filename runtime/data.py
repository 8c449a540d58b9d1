"""Text from files and data sets, as strings, as token windows, or as rows to train on.

A source is a ``.txt`` file (one text), a ``.jsonl``/``.json`` file, a table file (``.parquet``, ``.csv``) or folder, or
a hub data set ``NAME[:CONFIG[:SPLIT]]``; the last two are read by the package ``datasets``. Rows carry ``text``,
``messages`` (role, content), ``conversations`` (sharegpt: from, value) or ``instruction``, ``input``, ``output``
(alpaca).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt import assets
from sparse_rt.errors import UserError
from sparse_rt.optional import require

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".csv", ".arrow")
SHAPES = "text | messages (role, content) | conversations (from, value) | instruction, input, output"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

# The prompt of Stanford Alpaca, used for alpaca rows when the tokenizer brings no chat template.
_ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
)
_ALPACA_INPUT = ", paired with an input that provides further context"


def read_texts(source: str | Path | None, tokenizer=None) -> list[str]:
    """Every text of ``source`` (None: the shipped calibration text); conversations go through the chat template.

    Empty rows are left out. Raises ``UserError`` for a missing or unreadable source, unknown columns, or conversations
    without a tokenizer that has a chat template.
    """
    source = assets.calibration_text() if source is None else source
    texts = [text for text, _ in _documents(source, tokenizer)]
    if not texts:
        raise UserError(f"data set {source} holds no text; give a source with at least one non-empty row")
    return texts


def token_windows(texts: Iterable[str], tokenizer, length: int, count: int | None = None, seed: int = 0) -> Tensor:
    """Windows of ``length`` tokens out of the concatenated texts: int64 [k, length].

    Every text is tokenized with the special tokens its tokenizer adds by itself, and texts are separated by the end
    token. Without ``count`` all windows that do not overlap, in order; with it ``count`` different random starts (all
    starts when there are fewer), chosen by ``seed`` as in the calibration of SparseGPT and Wanda.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        if stream:
            stream += end
        stream += _tokenize(tokenizer, text)
    if len(stream) < length:
        raise UserError(
            f"the text has {len(stream)} tokens, one window needs {length}; give a longer text or a lower max_seq_len"
        )
    tokens = torch.tensor(stream, dtype=torch.long)
    if count is None:
        return tokens[: len(stream) // length * length].view(-1, length)
    starts = len(stream) - length + 1
    chosen = random.Random(seed).sample(range(starts), min(count, starts))
    return torch.stack([tokens[start : start + length] for start in chosen])


def training_dataset(source: str | Path | None, tokenizer, max_seq_len: int, seed: int = 0):
    """A ``datasets.Dataset`` of input_ids, labels and attention_mask (None: the shipped fine-tuning text).

    The loss counts every token, as in the recipe of SPP (arXiv 2405.16057). Each text ends with the end token. Plain
    text longer than ``max_seq_len`` is cut into consecutive pieces, so that none of it is lost; a conversation or an
    instruction is truncated, because a piece without its beginning teaches nothing. ``seed`` shuffles the rows.
    """
    datasets = require("datasets", extra="train")
    import numpy as np

    source = assets.finetune_jsonl() if source is None else source
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[Any] = []
    for text, rendered in _documents(source, tokenizer):
        tokens = _tokenize(tokenizer, text, add_special_tokens=not rendered)
        tokens += end if tokens[-1:] != end else []
        stop = max_seq_len if rendered else len(tokens)
        pieces = [tokens[i : i + max_seq_len] for i in range(0, min(stop, len(tokens)), max_seq_len)]
        # The first token of a piece is never predicted: one token alone trains nothing.
        rows += [np.array(piece, dtype=np.int32) for piece in pieces if len(piece) > 1]
    if not rows:
        raise UserError(f"data set {source} holds no text to train on; give a source with at least one non-empty row")
    random.Random(seed).shuffle(rows)
    masks = [np.ones(len(row), dtype=np.int8) for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": masks})


def _tokenize(tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    # verbose=False: a text longer than the model's context is cut into windows here, the warning would be wrong.
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _documents(source: str | Path, tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, whether a chat template or prompt made it) of every row that is not empty."""
    path = Path(source)
    if path.suffix.lower() in TEXT_SUFFIXES and not path.is_dir():
        text = _read_file(path)
        if text.strip():
            yield text, False
        return
    shape = None
    for number, row in enumerate(_rows(source, path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{source}: row {number} is {type(row).__name__}, expected an object with named columns")
        shape = shape or _shape_of(row, source)
        try:
            text, rendered = _RENDER[shape](row, tokenizer), shape != "text"
        except (KeyError, TypeError) as error:
            raise UserError(f"{source}: row {number} is not of the shape {shape!r} ({error!r})") from error
        if text and text.strip():
            yield text, rendered


def _rows(source: str | Path, path: Path) -> Iterable[Any]:
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES and not path.is_dir():
        return _json_rows(path)
    if suffix in TABLE_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"data set {source}: no such file")
        kind = suffix[1:]
        return _load_dataset(source, kind, data_files=str(path), split="train")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved_dataset(source)
        return _load_dataset(source, str(path), split="train")
    if path.is_file() or str(source).startswith((".", "/", "~")):
        known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES))
        problem = "is of an unknown kind" if path.is_file() else "does not exist"
        raise UserError(f"data set {source} {problem}; give a file ({known}), a folder or a hub name")
    name, _, rest = str(source).partition(":")
    config, _, split = rest.partition(":")
    return _load_dataset(source, name, config or None, split=split or "train")


def _load_dataset(source: str | Path, *arguments, **options) -> Iterable[Any]:
    datasets = require("datasets", extra="train")
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the library raises a dozen types for missing names, splits, files and networks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set {source!r} cannot be loaded ({reason}); hub names are NAME[:CONFIG[:SPLIT]]"
        ) from error


def _saved_dataset(source: str | Path) -> Iterable[Any]:
    """A folder that ``datasets`` wrote with ``save_to_disk``; of several splits the one called train."""
    data = require("datasets", extra="train").load_from_disk(str(source))
    if not isinstance(data, dict):
        return data
    if "train" not in data:
        raise UserError(f"data set {source} has the splits {', '.join(data)}; one must be called train")
    return data["train"]


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json_rows(path: Path) -> Iterator[Any]:
    """JSON lines, or one JSON array of rows."""
    text = _read_file(path)
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); write one row a line") from error


def _shape_of(row: dict[str, Any], source: str | Path) -> str:
    if "messages" in row or "conversations" in row:
        return "messages" if "messages" in row else "conversations"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    raise UserError(f"data set {source} has the columns {', '.join(map(str, row)) or '(none)'}; known are {SHAPES}")


def _plain(row: dict[str, Any], tokenizer) -> str:
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}")
    return text or ""


def _chat(messages: list[dict[str, str]], tokenizer) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "conversations need a tokenizer with a chat template, this one has none; use a tokenizer_config.json with "
            "`chat_template`, or data with the column `text`"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _messages(row: dict[str, Any], tokenizer) -> str:
    return _chat([{"role": part["role"], "content": _content(part["content"])} for part in row["messages"]], tokenizer)


def _conversations(row: dict[str, Any], tokenizer) -> str:
    messages = []
    for part in row["conversations"]:
        role, content = (part["from"], part["value"]) if "from" in part else (part["role"], part["content"])
        messages.append({"role": _ROLES.get(role, role), "content": _content(content)})
    return _chat(messages, tokenizer)


def _content(content: Any) -> str:
    if isinstance(content, list):  # parts, as multimodal chats write them: only text can be trained on here
        return "".join(_content(part["text"]) for part in content)
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}, expected text")
    return content


def _alpaca(row: dict[str, Any], tokenizer) -> str:
    """With a chat template one user and one assistant turn, otherwise the prompt of Stanford Alpaca."""
    instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
    if getattr(tokenizer, "chat_template", None) is not None:
        question = f"{instruction}\n\n{given}" if given else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return tokenizer.apply_chat_template(turns, tokenize=False)
    head = _ALPACA.format(also=_ALPACA_INPUT if given else "")
    context = f"\n\n### Input:\n{given}" if given else ""
    return f"{head}\n\n### Instruction:\n{instruction}{context}\n\n### Response:\n{output}"


_RENDER = {"text": _plain, "messages": _messages, "conversations": _conversations, "alpaca": _alpaca}
