"""Three domains of text that every machine has after `make setup`, split by file: Python, English prose, C and C++.

    python   sources of torch, sympy and networkx as installed: not the standard library, which the model was trained on
    prose    the topics of Python's language reference (`help()`), descriptions and licences of installed packages, the
             system's common licences
    c        headers of Python and of torch

A hash of a file's name decides whether it is for training, for validation (which chooses rates and strengths) or for
the test. Of validation and test texts those are left out that share more than three lines in ten with the others.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt import assets
from sparse_rt.data import token_windows
from sparse_rt.hf.load import load_tokenizer

DOMAINS = ("python", "prose", "c")
SPLITS = ("train", "validation", "test")
LENGTH = 256
# Windows of LENGTH tokens, drawn from so many characters of each split.
WINDOWS = {"train": 800, "validation": 12, "test": 16}
CHARACTERS = 1_500_000
SMALLEST, LARGEST = 500, 60_000  # bytes of a file: stubs and generated tables are left out
SHARED_LINES = 0.3
# Folder that keeps the windows for other processes; continual_learning.py sets it.
CACHE: Path | None = None
# Files that are read of each source at most, in the order of their hashes.
FILES = 250


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """train 80 %, validation 10 %, test 10 % of the files."""
    bucket = _hash(f"continual {name}") % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def read(root: Path, patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of at most FILES files below ``root``."""
    paths = sorted({path for pattern in patterns for path in root.rglob(pattern) if path.is_file()})
    named = sorted((_hash(path.relative_to(root).as_posix()), path) for path in paths)
    found = 0
    for _, path in named:
        if found == FILES:
            return
        if SMALLEST <= path.stat().st_size <= LARGEST:
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
            found += 1
            yield f"{root.name}/{path.relative_to(root).as_posix()}", text


def package(name: str) -> Path:
    return Path(importlib.import_module(name).__file__).parent


def python_files() -> Iterator[tuple[str, str]]:
    for name in ("torch", "sympy", "networkx"):
        for file, text in read(package(name), ["*.py"]):
            if "/test" not in file:
                yield file, text


def prose_files() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if len(text) >= SMALLEST:
            yield f"topics/{name}", text
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.name.lower()):
        text = str(distribution.metadata.get_payload() or distribution.metadata.get("Description") or "")
        if SMALLEST <= len(text) <= LARGEST:
            yield f"description/{distribution.name.lower()}", text
    folder = Path("/usr/share/common-licenses")
    yield from read(folder, ["*"]) if folder.is_dir() else ()


def c_files() -> Iterator[tuple[str, str]]:
    yield from read(Path(sysconfig.get_path("include")), ["*.h"])
    yield from read(package("torch") / "include", ["*.h", "*.hpp", "*.cuh"])


FILES_OF = {"python": python_files, "prose": prose_files, "c": c_files}


def split(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts by split, in the order of their hashes, without those for measuring that share lines with the others."""
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    ordered = sorted(files, key=lambda file: (SPLITS.index(split_of(file[0])), _hash(file[0]), file[0]))
    for name, text in ordered:
        part = split_of(name)
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) > 20}
        if part != "train" and lines and len(lines & seen) > SHARED_LINES * len(lines):
            continue
        seen |= lines
        parts[part].append(text)
    return parts


@functools.cache
def windows(domain: str) -> dict[str, Tensor]:
    """int64 [WINDOWS, LENGTH] for every split."""
    path = CACHE / f"{domain}.pt" if CACHE else None
    if path and path.is_file():
        return torch.load(path)
    found = _windows(domain)
    if path:
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(found, own)
        own.rename(path)
    return found


def _windows(domain: str) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(assets.model_dir())
    found = {}
    for part, texts in split(FILES_OF[domain]()).items():
        taken, used = [], 0
        for text in texts:
            if used < CHARACTERS:
                taken.append(text)
                used += len(text)
        found[part] = token_windows(taken, tokenizer, LENGTH, WINDOWS[part])
    return found


def digest(domain: str) -> str:
    """Which texts these are: the first 12 digits of a sha256 over all windows."""
    total = hashlib.sha256()
    for part in SPLITS:
        total.update(windows(domain)[part].to(torch.int32).numpy().tobytes())
    return total.hexdigest()[:12]
