"""What the user sees: progress and errors on standard error, results on standard output, JSON where asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sparse_rt.errors import UserError
from sparse_rt.progress import Progress
from sparse_rt.report import size

T = TypeVar("T")


class ConsoleProgress(Progress):
    """A bar on a terminal, plain lines otherwise; everything goes to standard error."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        if not self.terminal:  # the bars of transformers and the hub are tqdm's
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def stage(self, text: str) -> None:
        if not self.quiet:
            print(f"-- {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(f"   {text}", file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        if not self.terminal:
            self.stage(description)
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description, total=total, console=Console(stderr=True), transient=True)


def check_json_target(target: str | None) -> None:
    """Refuse an unwritable ``--json`` file before the work begins."""
    if target in (None, "-"):
        return
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise UserError(f"--json {target}: the folder {folder} does not exist; create it or choose another file")


def write_json_result(result: dict[str, Any], target: str | None) -> None:
    """The result as one JSON object, to a file or ("-") to standard output."""
    if target is None:
        return
    text = json.dumps(result, indent=2, default=str) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(target).write_text(text)


def table(title: str, columns: list[str], rows: Iterable[Iterable[Any]]):
    """A rich table; numbers are right-aligned by giving their column a name that ends with ">"."""
    from rich import box
    from rich.table import Table

    named = any(columns)
    built = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", show_header=named)
    for column in columns:
        built.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        built.add_row(*(str(cell) for cell in row))
    return built


def show(*parts: Any) -> None:
    """Print text or tables to standard output, wide enough not to cut when it is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def facts(title: str, result: dict[str, Any], skip: tuple[str, ...] = ()):
    """The plain figures of a result as a two-column table; lists and nested objects are for ``--json``."""
    rows = []
    for name, value in result.items():
        if name in skip or isinstance(value, (dict, list)) or value is None:
            continue
        if name.endswith("bytes"):
            value = size(value)
        elif isinstance(value, float):
            value = f"{value:.6g}"
        rows.append((name.replace("_", " "), value))
    return table(title, ["", ""], rows)
