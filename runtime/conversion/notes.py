"""What a conversion found out before its first shard, kept beside the shards: ``--resume`` need not repeat it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Hidden: no manifest lists them, and they go when everything else is in place.
OUTLIERS, SAMPLES = ".outliers.json", ".samples.json"


def stored(folder: Path, name: str, mark: str) -> Any:
    """What an interrupted conversion kept as ``name`` under the same ``mark``; None when there is nothing."""
    try:
        note = json.loads((folder / name).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return note["found"] if note["mark"] == mark else None


def store(folder: Path, name: str, mark: str, found: Any) -> None:
    """``found`` (anything that JSON holds) on disk, whole or not at all."""
    temporary = folder / f"{name}.tmp"
    with temporary.open("w") as file:
        file.write(json.dumps({"mark": mark, "found": found}))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / name)


def remove_notes(folder: Path) -> None:
    for name in (OUTLIERS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
