"""The rows of a source: files are read here, folders and hub data sets by the package ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparse_rt.errors import UserError
from sparse_rt.optional import require

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".csv", ".arrow")


def is_text_file(source: str | Path) -> bool:
    path = Path(source)
    return path.suffix.lower() in TEXT_SUFFIXES and not path.is_dir()


def rows(source: str | Path) -> Iterable[Any]:
    """Every row of ``source``, whatever it is; ``UserError`` for what cannot be read."""
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES and not path.is_dir():
        return _json_rows(path)
    if suffix in TABLE_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"data set {source}: no such file")
        return _load_dataset(source, suffix[1:], data_files=str(path), split="train")
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


def read_file(path: Path) -> str:
    """UTF-8 text; ``UserError`` when it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file: it holds zero bytes; give text, JSON lines, or a table")
    return text


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


def _json_rows(path: Path) -> Iterator[Any]:
    """JSON lines, or one JSON array of rows."""
    text = read_file(path)
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
