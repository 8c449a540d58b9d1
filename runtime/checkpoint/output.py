"""Output folders that appear whole or not at all: a hidden sibling is written and renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_rt.errors import UserError


def check_output(path: str | Path, overwrite: bool) -> Path:
    """The absolute output path; ``UserError`` when it is a file or a non-empty folder and ``overwrite`` is not set."""
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"output folder {path} is not empty; choose another, or pass --overwrite to replace it")
    return path


def partial_path(path: str | Path) -> Path:
    """Where an unfinished output of ``path`` lives until it is renamed."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.partial")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_directory(
    path: str | Path, overwrite: bool = False, resume: bool = False, keep: bool = False
) -> Iterator[Path]:
    """Yield the temporary sibling of ``path``; rename it over ``path`` when the block ends without an error.

    ``resume`` continues the unfinished sibling of an earlier run (removed otherwise); ``keep`` leaves it behind on an
    error, for a later ``resume``. A second process writing the same output is refused.
    """
    path = check_output(path, overwrite)
    partial = partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock_path = partial.with_name(partial.name + ".lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing {path}; wait for it or choose another output folder") from None
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        try:
            yield partial
            _publish(partial, path)
        except BaseException:
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock_path.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            fsync(file)
    fsync(partial)
    replaced = None
    if path.is_dir():
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(path, replaced)
    os.rename(partial, path)
    fsync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
