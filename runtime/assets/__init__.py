"""A small trained Llama with its texts, so that demos, tests and quick measurements need no download.

The files are data of the package; `README.md` next to this module says what they are and how they were made.
"""

import hashlib
from pathlib import Path

from sparse_rt.errors import UserError

_FOLDER = Path(__file__).parent

__all__ = ["calibration_text", "finetune_jsonl", "heldout_text", "model_dir", "verify"]


def model_dir() -> Path:
    """Hugging Face folder of the trained Llama: config, bf16 model.safetensors, byte-level BPE tokenizer."""
    return _FOLDER / "pystdlib-5m"


def heldout_text() -> Path:
    """UTF-8 text that no training step saw; use it for perplexity."""
    return _FOLDER / "heldout.txt"


def calibration_text() -> Path:
    """UTF-8 text for pruning calibration; it belongs to the training distribution and overlaps the training files."""
    return _FOLDER / "calibration.txt"


def finetune_jsonl() -> Path:
    """JSON lines with one column, `text`, for fine-tuning; disjoint from the held-out text."""
    return _FOLDER / "finetune.jsonl"


def verify() -> None:
    """Compare every asset with its sha256 digest in SHA256SUMS.

    Raises UserError naming the first file that is missing or differs.
    """
    repair = "restore it by reinstalling sparse-rt or by checking out runtime/assets again"
    for line in (_FOLDER / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = _FOLDER / name
        if not path.is_file():
            raise UserError(f"the asset {path} is missing; {repair}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(f"the asset {path} has sha256 {found}, SHA256SUMS says {expected}; {repair}")
